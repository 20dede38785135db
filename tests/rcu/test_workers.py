"""Grace periods that wait in workers must not keep other work from running."""

from typing import Any

from kmodel.core import engine, smp_cond_load_acquire, smp_store_release, variables
from kmodel.rcu import SrcuStruct, call_srcu, srcu_barrier, srcu_down_read, srcu_up_read


def test_blocked_grace_periods_leave_a_worker_for_whoever_ends_them() -> None:
    """Callbacks of many domains wait for readers that only a work item ends, as the uprobe's lease timer does
    (H58).
    """
    v = variables(ended=0)
    domains = [(ssp := SrcuStruct(f"lease-{n}"), srcu_down_read(ssp)) for n in range(12)]
    ran: list[Any] = []
    for ssp, _idx in domains:
        call_srcu(ssp, ssp, ran.append)

    def end_leases() -> None:
        for ssp, idx in domains:
            srcu_up_read(ssp, idx)
        smp_store_release(v, "ended", 1)

    engine().run_later(end_leases, 0.02, "timer")
    smp_cond_load_acquire(v, "ended", bool)
    for ssp, _idx in domains:
        srcu_barrier(ssp)
    assert len(ran) == 12
