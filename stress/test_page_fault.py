"""The four page_fault programs, small and judged."""

from contextlib import nullcontext

import pytest

from kmodel.core import boot, kernel_warnings
from kmodel.fs import page as page_module
from kmodel.fs import prune_icache
from kmodel.mm import PAGE_SIZE, get_mm_rss, mmap_lock_only, mmput, vma_lock_statistics
from kmodel.mm.page_table import check_invariants
from kmodel.rcu import rcu_barrier
from stress.page_fault import PROGRAMS, Run, measure


@pytest.mark.parametrize("locks", ["vma", "mmap"])
@pytest.mark.parametrize("number", PROGRAMS)
def test_page_fault(number: int, locks: str) -> None:
    """3 threads, 16 pages each, round after round: the counters add up, and at the end nothing is left."""
    boot()
    with mmap_lock_only() if locks == "mmap" else nullcontext():
        run = Run(number, 3, 16 * PAGE_SIZE)
        average = measure(run, 1, 0, 0.15)
        run.end()
    counts, faults = vma_lock_statistics(), sum(result[0] for result in run.results)
    print(average, faults, counts)
    tried = counts["vma_lock_success"] + counts["vma_lock_abort"] + counts["vma_lock_retry"]
    assert tried == (faults if locks == "vma" else 0)
    assert faults
    assert (get_mm_rss(run.mm), run.mm.map_count, run.mm.total_vm) == (0, 0, 0)
    check_invariants(run.mm)
    mmput(run.mm)
    rcu_barrier()
    prune_icache()
    rcu_barrier()
    assert page_module.page_cachep.statistics().live == 0
    assert kernel_warnings() == ()
