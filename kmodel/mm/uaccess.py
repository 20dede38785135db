"""What a task does with its memory: load, store, execute, and take the fault that comes of it.

Models:      a processor: the walk of the page table, the fault, the access again
Guards:      the page table's lock during the access: it stands for the TLB entry that unmapping flushes
             before the page is freed
Invariants:  U1 a load returns what the last store to the place left, in whichever mapping of the page it was
Leaves out:  TLBs, alignment, atomic instructions, accesses across a page's end
Read next:   mm/fault.py

None of these names is Linux's; copy_from_user() and its like are a kernel's accesses, these are a program's.
"""

import signal
from typing import Any

from kmodel.fs.page import Page, is_zero_page, memcpy_from_page, memcpy_to_page
from kmodel.mm.fault import X86_PF_INSTR, X86_PF_PROT, X86_PF_USER, X86_PF_WRITE, Siginfo, do_user_addr_fault
from kmodel.mm.flags import PAGE_MASK, VM_EXEC
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.page_table import Pte, pte_at, pte_lock, pte_unlock


class Signal(Exception):
    """The access ended in a signal."""

    def __init__(self, info: Siginfo) -> None:
        name = signal.Signals(info.si_signo).name
        super().__init__(f"{name} (code {info.si_code}) at {info.si_addr:#x}")
        self.info = info


def user_load(mm: MmStruct, address: int, n: int = 1) -> bytes:
    """n bytes at the address, within one page. Signal if the task may not read them."""
    return bytes(_access(mm, address, X86_PF_USER, n, b""))


def user_store(mm: MmStruct, address: int, data: bytes) -> None:
    """Write bytes at the address, within one page. Signal if the task may not."""
    _access(mm, address, X86_PF_USER | X86_PF_WRITE, 0, data)


def user_fetch(mm: MmStruct, address: int, n: int = 1) -> bytes:
    """n bytes at the address, to execute them."""
    return bytes(_access(mm, address, X86_PF_USER | X86_PF_INSTR, n, b""))


def _allows(pte: Pte | None, error_code: int) -> bool:
    if pte is None:
        return False
    if error_code & X86_PF_WRITE:
        return pte.write
    return bool(pte.prot & VM_EXEC if error_code & X86_PF_INSTR else pte.prot)


def _load(page: Page, offset: int, n: int) -> bytes:
    return bytes(n) if is_zero_page(page) else memcpy_from_page(page, offset, n)


def _access(mm: MmStruct, address: int, error_code: int, n: int, data: bytes) -> Any:
    page_address, offset = address & PAGE_MASK, address & ~PAGE_MASK
    while True:
        table = pte_lock(mm, page_address)
        pte = pte_at(table, page_address)
        allowed = _allows(pte, error_code)
        result = b""
        if allowed:
            assert pte is not None
            if error_code & X86_PF_WRITE:
                memcpy_to_page(pte.page, offset, data)
            else:
                result = _load(pte.page, offset, n)
        pte_unlock(table)
        if allowed:
            return result
        present = X86_PF_PROT if pte is not None else 0
        info = do_user_addr_fault(mm, error_code | present, address)
        if info is not None:
            raise Signal(info)
