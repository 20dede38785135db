"""Where the oracle looks on: at the end of each speculation, in each handler, at each descent and reference
taken.

Models:      nothing in Linux
Guards:      none: it runs in the task that it watches, and reads journals that writers append to
Invariants:  P1 an accepted speculation is what the address had at its own sample of mm_lock_seq
             P7 no handler runs after uprobe_unregister_sync(); each is called for its own place only
Leaves out:  answers of the slow path are judged by the handlers they lead to
Read next:   torture/tasks.py

Functions of this module go into the `observer` slots of uprobes/lookup.py and uprobes/tree.py. They are plain
functions
and take what they need from the calling task, because free-threaded Python makes threads wait for each other
at objects
that they share.
"""

from typing import Any

from kmodel.core import current, generation, is_freed
from kmodel.sync import refcount_read
from kmodel.torture.journal import Entry, Picture, Slot
from kmodel.torture.oracle import name_of
from kmodel.torture.world import Member, TortureConsumer

SHOWN_ENTRIES = 4


def member() -> Member | None:
    """The calling task's place in the torture, if it has one."""
    return current().local.get("torture")


def lock_sequence(mm: Any) -> int:
    """The value of mm_lock_seq now, without telling any engine."""
    seq = mm.mm_lock_seq
    return int(getattr(seq, "sequence", seq))


# ----------------------------------------------------------------------------------------------- speculations


def speculated(
    mm: Any, address: int, seq: int, vma: Any, file: Any, inode: Any, offset: int, uprobe: Any, accepted: bool
) -> None:
    """A speculative lookup found a uprobe, and accepted it or threw it away."""
    me = member()
    if me is None:
        return
    log = me.log
    log.note(
        "speculate {:#x}: seq {} -> {} -> {} -> {}, offset {:#x} -> {}: {}",
        address,
        seq,
        vma,
        file,
        inode,
        offset,
        uprobe,
        "accepted" if accepted else "seq has moved, thrown away",
    )
    slot = me.slots.get(address)
    truth = None if slot is None else slot.at(seq)
    if truth is not None:
        count_reuse(me, truth.picture, vma, file)
    if not accepted:
        log.count("speculation_retried")
        return
    log.count("speculation_accepted")
    me.hit_was_fast = True
    if refcount_read(uprobe, "ref") == 0:
        log.count("uprobe_dying")
    if slot is None:
        key = me.fixed.get(address)
        if key is None:
            return
        expected = key.place
    elif truth is None:
        log.count("too_old_to_judge")
        return
    else:
        expected = truth.picture.place
    if uprobe.inode is not expected[0] or uprobe.offset != expected[1]:
        wrong_speculation(me, mm, address, seq, vma, file, inode, offset, uprobe, slot, truth, expected)


def count_reuse(me: Member, picture: Picture, vma: Any, file: Any) -> None:
    """Count it if the VMA or file in hand has been freed since the sample: the reader held on to recycled
    memory.
    """
    if picture.file is file and file is not None and _moved_on(file, picture.file_generation):
        me.log.count("file_reused")
    if picture.vma is vma and vma is not None and _moved_on(vma, picture.vma_generation):
        me.log.count("vma_reused")


def _moved_on(obj: Any, life: int) -> bool:
    return is_freed(obj) or generation(obj) != life


def _life(picture: Picture | None, what: str, obj: Any) -> str:
    """Which life of a recycled object this is, compared with the one the journal knows."""
    if is_freed(obj):
        return f" (free now, {generation(obj)} lives over)"
    if (
        picture is not None
        and getattr(picture, what) is obj
        and generation(obj) != getattr(picture, f"{what}_generation")
    ):
        return (
            f" (reused: life {generation(obj)}, was {getattr(picture, f'{what}_generation')} at the sample)"
        )
    return f" (life {generation(obj)})"


def wrong_speculation(
    me: Member,
    mm: Any,
    address: int,
    seq: int,
    vma: Any,
    file: Any,
    inode: Any,
    offset: int,
    uprobe: Any,
    slot: Slot | None,
    truth: Entry | None,
    expected: tuple[Any, int],
) -> None:
    """Report an accepted speculation that the journal contradicts: the reader's steps, and what the writers
    did.
    """
    world = me.world
    picture = truth.picture if truth is not None else None
    found = world.label(uprobe.inode, uprobe.offset)
    right = world.label(*expected) if expected[0] is not None else "no probe at all"
    by = f", since seq {truth.seq} by {truth.writer}" if truth is not None else ", always"
    facts = [
        "the reader, in order:",
        f"  mmap_lock_speculate_try_begin    seq {seq}, even: no writer",
        f"  vma_lookup({address:#x})       {name_of(vma)}{_life(picture, 'vma', vma)}",
        f"  READ_ONCE(vma.vm_file)           {name_of(file)}{_life(picture, 'file', file)}",
        f"  f_inode; vm_pgoff, vm_start      {name_of(inode)}, offset {offset:#x}",
        f"  find_uprobe_rcu                  {name_of(uprobe)} = {found}",
        f"  and it was accepted              mm_lock_seq is {lock_sequence(mm)} by now",
        "the writers, by the journal:",
        f"  at seq {seq} the address showed {right}{by}",
    ]
    if slot is not None:
        facts += [f"  {line}" for line in show_entries(slot.around(seq, SHOWN_ENTRIES))]
    me.oracle.violate(
        me.log,
        "P1 (an accepted speculation is right at its sample)",
        f"the speculation at {address:#x} found {found}, but the address showed {right}",
        facts,
        others="remap",
    )


def show_entries(entries: list[Entry]) -> list[str]:
    """Journal entries as lines."""
    return [f"from seq {e.seq}: {e.picture}   ({e.writer}: {e.operation})" for e in entries]


# ------------------------------------------------------------------------------------------------ handlers


def on_hit(consumer: TortureConsumer, regs: Any, _data: Any) -> int:
    """The handler of every consumer of the torture."""
    me = member()
    if me is None:
        return 0
    log = me.log
    log.count("handler_call")
    me.hit_calls += 1
    check_registered(me, consumer, "was called")
    address = me.hit_address
    if regs.ip != address:
        me.oracle.violate(
            log, "P7 (handlers are called for their own place)", f"ip is {regs.ip:#x}, not {address:#x}"
        )
    check_place(me, consumer, address)
    me.pause(me)
    check_registered(me, consumer, "was still running")
    return 0


def check_registered(me: Member, consumer: TortureConsumer, what: str) -> None:
    """Report a handler that runs although uprobe_unregister_sync() has returned for its consumer."""
    if consumer.unregistered:
        me.oracle.violate(
            me.log,
            "P7 (no handler after uprobe_unregister_sync)",
            f"the handler for {consumer.label} {what} after uprobe_unregister_sync() had returned",
            others="register",
        )


def check_place(me: Member, consumer: TortureConsumer, address: int) -> None:
    """Report a handler that is called for an address which was not its place at any time during the hit."""
    slot = me.slots.get(address)
    if slot is None:
        key = me.fixed.get(address)
        if key is None or key.place == consumer.place:
            return
        showed, entries = str(key.probe), []
    else:
        known = slot.between(me.hit_seq, lock_sequence(me.process.mm))
        if known is None:
            me.log.count("too_old_to_judge")
            return
        inode, offset = consumer.place
        if any(e.picture.inode is inode and e.picture.offset == offset for e in known):
            return
        showed, entries = " or ".join(dict.fromkeys(str(e.picture) for e in known)), known[-SHOWN_ENTRIES:]
    me.oracle.violate(
        me.log,
        "P1, P7 (handlers are called for their own place)",
        f"the handler for {consumer.label} was called at {address:#x}, which showed {showed} during the hit",
        [f"journal: {line}" for line in show_entries(entries)],
        others="remap",
    )


# ---------------------------------------------------------------------------------------- tree and references


def dead_twin(uprobe: Any) -> None:
    """__insert_uprobe met a dying uprobe of its own key and took it out (uprobes/tree.py's observer)."""
    me = member()
    if me is not None:
        me.log.count("dead_twin")
        me.log.note("insert {}: a dying twin was in its place", uprobe)
