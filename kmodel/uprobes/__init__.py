"""Uprobes: from a breakpoint hit to its handlers, and everything that lets that path run without locks."""

from kmodel.uprobes.arch import UPROBE_SWBP_INSN, UPROBE_SWBP_INSN_SIZE, ArchUprobe, PtRegs
from kmodel.uprobes.consumer import (
    UPROBE_HANDLER_IGNORE,
    UPROBE_HANDLER_NORMAL,
    UPROBE_HANDLER_REMOVE,
    Cookie,
    UprobeConsumer,
)
from kmodel.uprobes.handler import exc_int3, handle_swbp
from kmodel.uprobes.lifetime import get_uprobe, put_uprobe, try_get_uprobe
from kmodel.uprobes.lookup import find_active_uprobe_rcu, find_active_uprobe_speculative
from kmodel.uprobes.mm_hooks import (
    uprobe_clear_state,
    uprobe_dup_mmap,
    uprobe_end_dup_mmap,
    uprobe_mmap,
    uprobe_munmap,
    uprobe_start_dup_mmap,
)
from kmodel.uprobes.pages import fetch_opcode
from kmodel.uprobes.register import (
    uprobe_apply,
    uprobe_register,
    uprobe_unregister,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)
from kmodel.uprobes.register_batch import BatchConsumer, uprobe_register_batch, uprobe_unregister_batch
from kmodel.uprobes.ri_timer import RI_TIMER_PERIOD, ri_timer, uprobe_free_utask
from kmodel.uprobes.schemes import ALL_SCHEMES, SCHEMES, Scheme, uprobe_scheme
from kmodel.uprobes.sstep import older_deny_signal, uprobe_deny_signal
from kmodel.uprobes.tree import find_uprobe_rcu, uprobe_is_active
from kmodel.uprobes.uprobe import Uprobe
from kmodel.uprobes.uretprobe import MAX_URETPROBE_DEPTH, uprobe_copy_process, uprobe_handle_trampoline
from kmodel.uprobes.utask import force_sig, forced_signals
from kmodel.uprobes.xol import dup_xol_work, get_xol_area, uprobe_get_trampoline_vaddr

__all__ = [
    "ALL_SCHEMES",
    "MAX_URETPROBE_DEPTH",
    "RI_TIMER_PERIOD",
    "SCHEMES",
    "UPROBE_HANDLER_IGNORE",
    "UPROBE_HANDLER_NORMAL",
    "UPROBE_HANDLER_REMOVE",
    "UPROBE_SWBP_INSN",
    "UPROBE_SWBP_INSN_SIZE",
    "ArchUprobe",
    "BatchConsumer",
    "Cookie",
    "PtRegs",
    "Scheme",
    "Uprobe",
    "UprobeConsumer",
    "dup_xol_work",
    "exc_int3",
    "fetch_opcode",
    "find_active_uprobe_rcu",
    "find_active_uprobe_speculative",
    "find_uprobe_rcu",
    "force_sig",
    "forced_signals",
    "get_uprobe",
    "get_xol_area",
    "handle_swbp",
    "older_deny_signal",
    "put_uprobe",
    "ri_timer",
    "try_get_uprobe",
    "uprobe_apply",
    "uprobe_clear_state",
    "uprobe_copy_process",
    "uprobe_deny_signal",
    "uprobe_dup_mmap",
    "uprobe_end_dup_mmap",
    "uprobe_free_utask",
    "uprobe_get_trampoline_vaddr",
    "uprobe_handle_trampoline",
    "uprobe_is_active",
    "uprobe_mmap",
    "uprobe_munmap",
    "uprobe_register",
    "uprobe_register_batch",
    "uprobe_scheme",
    "uprobe_start_dup_mmap",
    "uprobe_unregister",
    "uprobe_unregister_batch",
    "uprobe_unregister_nosync",
    "uprobe_unregister_sync",
]
