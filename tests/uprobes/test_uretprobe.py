"""Return probes: which returns are seen, in which order, with which cookie, and what keeps the uprobe."""

from typing import Any

import pytest

from kmodel.core import clear_warnings, current, is_freed, kernel_struct, kernel_warnings, untraced
from kmodel.mm import MmStruct, fork
from kmodel.proc import proc_maps
from kmodel.rcu import srcu_readers_active
from kmodel.slab import all_caches, fail_nth
from kmodel.uprobes import (
    MAX_URETPROBE_DEPTH,
    UPROBE_HANDLER_IGNORE,
    UPROBE_HANDLER_REMOVE,
    PtRegs,
    UprobeConsumer,
    dup_xol_work,
    forced_signals,
    get_xol_area,
    handle_swbp,
    lifetime,
    ri_timer,
    uprobe_copy_process,
    uprobe_free_utask,
    uprobe_get_trampoline_vaddr,
    uprobe_unregister,
    uprobe_unregister_nosync,
)
from kmodel.uprobes.hprobe import HPROBE_GONE, HPROBE_LEASED, HPROBE_STABLE
from kmodel.uprobes.uretprobe import CLONE_VFORK, CLONE_VM
from kmodel.uprobes.usermode import call, jump, longjmp, ret, setjmp
from kmodel.uprobes.utask import SIGILL, alloc_utask
from kmodel.uprobes.xol import UPROBE_NO_TRAMPOLINE_VADDR, xol_free_insn_slot
from tests.uprobes.world import TEXT, map_text, new_file, opcode, registered

F, G = TEXT + 1, TEXT + 3  # nops
HOME, INSIDE = 0x1234, 0x5678


@kernel_struct
class Watcher(UprobeConsumer):
    """Remembers entries and returns; `rc` and `cookie` are what its entry handler answers with."""

    log: list[Any] = untraced(factory=list)
    rc: int = untraced(default=0)
    cookie: int = untraced(default=0)


def entry(uc: Any, regs: PtRegs, data: Any) -> int:
    uc.log.append(("entry", regs.ip))
    if data is not None:
        data.value = uc.cookie
        uc.cookie += 1
    return int(uc.rc)


def back(uc: Any, func: int, regs: PtRegs, data: Any) -> int:
    uc.log.append(("return", func, regs.ip, None if data is None else data.value))
    return 0


def session(**kwargs: Any) -> Watcher:
    return Watcher(handler=entry, ret_handler=back, **kwargs)


@pytest.fixture
def mm() -> Any:
    """The address space of current, which ends its pending returns afterwards."""
    mm = MmStruct()
    current().mm = mm
    current().utask = None
    yield mm
    uprobe_free_utask()


@pytest.fixture
def file(mm: MmStruct) -> Any:
    """A program mapped at TEXT."""
    file = new_file()
    map_text(mm, file)
    return file


def leases() -> int:
    return srcu_readers_active(lifetime.uretprobes_srcu)


def test_a_return_is_seen_where_the_function_was_called(file: Any) -> None:
    """The return handler knows the function and where it goes on: where it would have gone anyway."""
    uc = Watcher(ret_handler=back)
    registered(file, 1, uc)
    regs = PtRegs()

    assert call(regs, F, HOME)
    assert regs.stack[regs.sp] == uprobe_get_trampoline_vaddr()
    assert leases() == 1
    assert ret(regs)

    assert regs.ip == HOME
    assert uc.log == [("return", F, HOME, None)]
    assert leases() == 0
    assert current().utask.depth == 0


def test_the_area_is_a_mapping_like_the_kernel_s(mm: MmStruct, file: Any) -> None:
    """The trampoline lies in "[uprobes]", one page at the top of the address space, made when needed."""
    assert uprobe_get_trampoline_vaddr() == UPROBE_NO_TRAMPOLINE_VADDR
    area = get_xol_area()

    assert area is not None
    assert get_xol_area() is area
    line = proc_maps(mm).splitlines()[-1].split()
    assert line[0] == f"{area.vaddr:08x}-{area.vaddr + 0x1000:08x}"
    assert line[1] == "--xp"
    assert line[-1] == "[uprobes]"
    assert area.vaddr == 0x7FFF_FFFF_E000


def test_nested_and_recursive_calls_return_in_reverse_order(file: Any) -> None:
    """Each return is matched with its own entry, innermost first."""
    outer, inner = session(cookie=10), session(cookie=20)
    registered(file, 1, outer)
    registered(file, 3, inner)
    regs = PtRegs()

    call(regs, F, HOME)
    call(regs, F, INSIDE)
    call(regs, G, INSIDE + 1)
    assert current().utask.depth == 3
    for expected in (INSIDE + 1, INSIDE, HOME):
        ret(regs)
        assert regs.ip == expected

    assert outer.log == [
        ("entry", F),
        ("entry", F),
        ("return", F, INSIDE, 11),
        ("return", F, HOME, 10),
    ]
    assert inner.log == [("entry", G), ("return", G, INSIDE + 1, 20)]


def test_a_tail_call_shares_its_caller_s_return(file: Any) -> None:
    """Both functions return at once, the one called last first, to where the first was called from."""
    uc = Watcher(ret_handler=back)
    registered(file, 1, uc)
    registered(file, 3, Watcher(ret_handler=back, log=uc.log))
    regs = PtRegs()

    call(regs, F, HOME)
    jump(regs, G)
    assert current().utask.depth == 2
    ret(regs)

    assert uc.log == [("return", G, HOME, None), ("return", F, HOME, None)]
    assert regs.ip == HOME
    assert leases() == 0


def test_frames_that_a_longjmp_skipped_are_dropped_at_the_next_entry(file: Any) -> None:
    """Their handlers do not run, their leases end, and the next return goes to the right place (H64)."""
    uc = Watcher(ret_handler=back)
    registered(file, 1, uc)
    registered(file, 3, Watcher(ret_handler=back, log=uc.log))
    regs = PtRegs()
    env = setjmp(regs)
    call(regs, F, HOME)
    call(regs, F, INSIDE)
    longjmp(regs, env)

    call(regs, G, HOME + 1)
    assert current().utask.depth == 1
    assert leases() == 1
    ret(regs)

    assert uc.log == [("return", G, HOME + 1, None)]
    assert regs.ip == HOME + 1


def test_frames_that_a_longjmp_skipped_are_dropped_at_the_next_return(file: Any) -> None:
    """A return through them finds the chain that is still alive, and runs only its handlers."""
    uc = Watcher(ret_handler=back)
    registered(file, 1, uc)
    regs = PtRegs()
    call(regs, F, HOME)
    env = setjmp(regs)
    call(regs, F, INSIDE)
    longjmp(regs, env)

    ret(regs)

    assert uc.log == [("return", F, HOME, None)]
    assert regs.ip == HOME
    assert current().utask.depth == 0
    assert leases() == 0


def test_depth_is_limited(file: Any) -> None:
    """The 65th nested call goes unseen, and returns all the same."""
    uc = Watcher(ret_handler=back)
    registered(file, 1, uc)
    regs = PtRegs()

    for n in range(MAX_URETPROBE_DEPTH + 1):
        call(regs, F, HOME + n)
    assert current().utask.depth == MAX_URETPROBE_DEPTH
    assert not ret(regs)
    assert regs.ip == HOME + MAX_URETPROBE_DEPTH
    for n in reversed(range(MAX_URETPROBE_DEPTH)):
        assert ret(regs)
        assert regs.ip == HOME + n

    assert len(uc.log) == MAX_URETPROBE_DEPTH


@pytest.mark.parametrize("rc", [UPROBE_HANDLER_IGNORE, UPROBE_HANDLER_REMOVE])
def test_a_session_may_decline_the_return(mm: MmStruct, file: Any, rc: int) -> None:
    """IGNORE and REMOVE at the entry mean no return handler; REMOVE of all takes the breakpoint away."""
    uc = session(rc=rc, filter=lambda uc, mm: not uc.log)
    registered(file, 1, uc)
    regs = PtRegs()

    call(regs, F, HOME)
    assert not ret(regs)

    assert uc.log == [("entry", F)]
    assert (opcode(mm, F) == 0xCC) is (rc == UPROBE_HANDLER_IGNORE)


def test_every_session_has_its_own_cookie(file: Any) -> None:
    """Cookies go from an entry handler to the same consumer's return handler, whoever else declines."""
    first, second, third = session(cookie=1), session(cookie=2, rc=UPROBE_HANDLER_IGNORE), session(cookie=3)
    for uc in (first, second, third):
        registered(file, 1, uc)
    regs = PtRegs()

    call(regs, F, HOME)
    ret(regs)

    assert first.log[1:] == [("return", F, HOME, 1)]
    assert second.log[1:] == []
    assert third.log[1:] == [("return", F, HOME, 3)]


def test_a_consumer_that_came_during_the_call(file: Any) -> None:
    """Without entry handler it sees the return; a session does not, for it did not see the entry."""
    registered(file, 1, Watcher(ret_handler=back))
    regs = PtRegs()
    call(regs, F, HOME)
    plain, late = Watcher(ret_handler=back), session()
    registered(file, 1, plain)
    registered(file, 1, late)

    ret(regs)

    assert plain.log == [("return", F, HOME, None)]
    assert late.log == []


def test_unregistered_during_the_call(file: Any) -> None:
    """The lease keeps the uprobe, nobody is called, and the free follows the return."""
    uc = Watcher(ret_handler=back)
    uprobe = registered(file, 1, uc)
    regs = PtRegs()
    call(regs, F, HOME)
    uprobe_unregister_nosync(uprobe, uc)
    assert not is_freed(uprobe)

    ret(regs)
    lifetime.wait_for_frees()

    assert uc.log == []
    assert regs.ip == HOME
    assert is_freed(uprobe)


def test_the_timer_trades_a_lease_for_a_reference(file: Any) -> None:
    """A call that takes long does not hold up SRCU (H58); its return gives the reference back."""
    uc = Watcher(ret_handler=back)
    uprobe = registered(file, 1, uc)
    regs = PtRegs()
    call(regs, F, HOME)
    ri = current().utask.return_instances
    assert (ri.hprobe.state, uprobe.ref) == (HPROBE_LEASED, 1)

    ri_timer(current().utask.ri_timer)
    assert (ri.hprobe.state, uprobe.ref, leases()) == (HPROBE_STABLE, 2, 0)
    ret(regs)

    assert uc.log == [("return", F, HOME, None)]
    assert uprobe.ref == 1


def test_the_timer_comes_by_itself(file: Any) -> None:
    """An unregister that waits for leases ends while the function is still running."""
    uc = Watcher(ret_handler=back)
    uprobe = registered(file, 1, uc)
    regs = PtRegs()
    call(regs, F, HOME)

    uprobe_unregister(uprobe, uc)

    assert leases() == 0
    ret(regs)
    assert regs.ip == HOME
    assert uc.log == []


def test_the_timer_meets_a_dying_uprobe(file: Any) -> None:
    """No reference can be had: the return finds nobody."""
    uc = Watcher(ret_handler=back)
    uprobe = registered(file, 1, uc)
    regs = PtRegs()
    call(regs, F, HOME)
    ri = current().utask.return_instances
    uprobe_unregister_nosync(uprobe, uc)

    ri_timer(current().utask.ri_timer)
    assert ri.hprobe.state == HPROBE_GONE
    lifetime.wait_for_frees()
    ret(regs)

    assert regs.ip == HOME
    assert is_freed(uprobe)


def test_instances_are_used_again(file: Any) -> None:
    """A return gives its instance to the next call, unless the timer is looking: then RCU frees it (H61)."""
    registered(file, 1, Watcher(ret_handler=back))
    utask_regs = PtRegs()
    call(utask_regs, F, HOME)
    utask = current().utask
    first = utask.return_instances
    ret(utask_regs)
    assert utask.ri_pool is first
    call(utask_regs, F, HOME)
    assert utask.return_instances is first

    utask.ri_seqcount.sequence += 1
    ret(utask_regs)
    utask.ri_seqcount.sequence += 1

    assert utask.ri_pool is None


def test_a_return_from_nowhere_is_sigill(file: Any) -> None:
    """Who jumps to the trampoline without a probed call gets SIGILL."""
    get_xol_area()
    regs = PtRegs(ip=uprobe_get_trampoline_vaddr() + 1)

    handle_swbp(regs)

    assert forced_signals() == [SIGILL]


def test_a_stack_that_cannot_be_read_goes_unseen(file: Any) -> None:
    """Where the return address cannot be replaced there is nothing to wait for."""
    uc = Watcher(ret_handler=back)
    registered(file, 1, uc)
    regs = PtRegs()

    jump(regs, F)

    assert current().utask.return_instances is None
    assert leases() == 0


def test_no_memory_for_an_instance_goes_unseen(file: Any) -> None:
    """The entry handler runs, the return is not seen, and nothing else happens."""
    uc = session()
    registered(file, 1, uc)
    regs = PtRegs()

    with fail_nth(1, cache="kmalloc-ReturnInstance"):
        call(regs, F, HOME)
    assert not ret(regs)

    assert uc.log == [("entry", F)]


class Child:
    """The part of a forked task that fork fills in."""

    def __init__(self, mm: MmStruct) -> None:
        self.mm = mm
        self.utask: Any = None


def test_fork_inside_a_probed_call(mm: MmStruct, file: Any) -> None:
    """Parent and child return, each with a reference of its own instead of the lease (H63)."""
    uc = Watcher(ret_handler=back)
    uprobe = registered(file, 1, uc)
    regs = PtRegs()
    call(regs, F, HOME)
    child: Any = Child(fork(mm))

    vaddr = uprobe_copy_process(child, 0)

    assert vaddr == uprobe_get_trampoline_vaddr()
    assert (uprobe.ref, leases()) == (3, 0)
    task, parent_utask = current(), current().utask
    childs = PtRegs(ip=regs.ip, sp=regs.sp, stack=dict(regs.stack))
    ret(regs)
    task.mm, task.utask = child.mm, child.utask
    dup_xol_work(vaddr)
    ret(childs)
    uprobe_free_utask()
    task.mm, task.utask = mm, parent_utask

    assert regs.ip == childs.ip == HOME
    assert len(uc.log) == 2
    assert uprobe.ref == 1


def test_threads_do_not_inherit_returns_and_vfork_does(mm: MmStruct, file: Any) -> None:
    """A thread has a stack of its own; a vfork child borrows its parent's."""
    registered(file, 1, Watcher(ret_handler=back))
    regs = PtRegs()
    call(regs, F, HOME)
    child: Any = Child(mm)

    assert uprobe_copy_process(child, CLONE_VM) == 0
    assert child.utask is None
    uprobe_copy_process(child, CLONE_VM | CLONE_VFORK)

    assert child.utask.depth == 1
    saved, current().utask = current().utask, child.utask
    uprobe_free_utask()
    current().utask = saved
    ret(regs)


def test_a_task_that_ends_gives_everything_back(file: Any) -> None:
    """uprobe_free_utask() ends leases and references of calls that will never return."""
    uprobe = registered(file, 1, Watcher(ret_handler=back))
    regs = PtRegs()
    call(regs, F, HOME)
    ri_timer(current().utask.ri_timer)
    call(regs, F, INSIDE)
    assert (uprobe.ref, leases()) == (2, 1)

    uprobe_free_utask()

    assert (uprobe.ref, leases()) == (1, 0)
    assert current().utask is None


def allocated(name: str) -> int:
    """How many objects of a slab cache are in use."""
    return sum(cache.statistics().live for cache in all_caches() if cache.name == name)


@pytest.mark.parametrize("cache", ["kmalloc-XolArea", "vm_area_struct"])
def test_no_memory_for_the_area_goes_unseen(file: Any, cache: str) -> None:
    """Without an area the function returns where it would have; the next call may have one."""
    uc = Watcher(ret_handler=back)
    registered(file, 1, uc)
    regs = PtRegs()

    with fail_nth(1, cache=cache):
        call(regs, F, HOME)
    assert uprobe_get_trampoline_vaddr() == UPROBE_NO_TRAMPOLINE_VADDR
    assert (current().utask.depth, leases(), allocated("kmalloc-XolArea")) == (0, 0, 0)
    assert not ret(regs)
    assert regs.ip == HOME

    call(regs, F, HOME)
    assert ret(regs)
    assert uc.log == [("return", F, HOME, None)]


def test_the_second_who_makes_an_area_frees_it(mm: MmStruct) -> None:
    """-EALREADY: there is one area, and the other is not leaked."""
    area = get_xol_area()

    dup_xol_work(0x1000)

    assert get_xol_area() is area
    assert allocated("kmalloc-XolArea") == 1


def free_child(child: Any) -> None:
    """The child ends."""
    saved, current().utask = current().utask, child.utask
    uprobe_free_utask()
    current().utask = saved


def test_fork_of_a_child_without_area(mm: MmStruct, file: Any) -> None:
    """A child that could not make its area has pending returns all the same; its own child makes none."""
    uprobe = registered(file, 1, Watcher(ret_handler=back))
    regs = PtRegs()
    call(regs, F, HOME)
    task, parent_utask = current(), current().utask
    child: Any = Child(fork(mm))
    vaddr = uprobe_copy_process(child, 0)
    task.mm, task.utask = child.mm, child.utask
    with fail_nth(1, cache="kmalloc-XolArea"):
        dup_xol_work(vaddr)
    grandchild: Any = Child(fork(child.mm))

    assert uprobe_copy_process(grandchild, 0) == 0

    assert grandchild.utask.depth == 1
    free_child(grandchild)
    uprobe_free_utask()
    task.mm, task.utask = mm, parent_utask
    ret(regs)
    assert (uprobe.ref, leases()) == (1, 0)


def test_a_slot_outside_of_the_area_is_forgotten(mm: MmStruct) -> None:
    """A warning, and the task is not said to be in a slot any more, so that its end does not warn again."""
    area = get_xol_area()
    utask = alloc_utask()
    assert area is not None
    utask.xol_vaddr = area.vaddr + 0x1000

    xol_free_insn_slot(utask)

    assert [warning.message for warning in kernel_warnings()] == ["an XOL slot outside of the area"]
    clear_warnings()
    assert utask.xol_vaddr == 0
    assert area.bitmap == 1
