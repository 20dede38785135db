"""Address spaces drawn as strings: one letter per page, that of its VMA, '.' where there is none."""

from contextlib import contextmanager

from kmodel.core import atomic_inc
from kmodel.mm import (
    VM_MAYREAD,
    VM_MAYWRITE,
    VM_READ,
    VM_WRITE,
    VmaIterator,
    find_vma,
    find_vma_prev,
    mm_alloc,
    mmap_write_lock,
    mmap_write_unlock,
    mmput,
    vm_area_alloc,
    vm_flags_init,
    vma_is_attached,
    vma_iter_init,
    vma_next,
    vma_set_range,
    vma_start_write,
)
from kmodel.mm.anon_vma import anon_vma_alloc
from kmodel.mm.maple_tree import check_invariants
from kmodel.mm.vma import VmOperations
from kmodel.mm.vma_iter import vma_iter_store_gfp
from kmodel.mm.vma_merge import VmaMergeStruct, vmg_of

PAGE = 4096
FIRST = 16  # page 0 of a picture
FLAGS = VM_READ | VM_WRITE | VM_MAYREAD | VM_MAYWRITE
CLOSES = VmOperations(close=lambda _vma: None)


def at(page):
    """The address of a page of the picture."""
    return (FIRST + page) * PAGE


class Space:
    """An address space whose mappings are known by letters."""

    def __init__(self, picture="", **attributes):
        self.mm = mm_alloc()
        self.letters = {}
        for letter in dict.fromkeys(picture.replace(".", "")):
            start, end = picture.index(letter), picture.rindex(letter) + 1
            assert picture[start:end] == letter * (end - start), "one letter, one mapping"
            self.put(letter, start, end, **attributes.get(letter, {}))

    def __getitem__(self, letter):
        return self.letters[letter]

    def put(self, letter, start, end, *, pgoff=None, flags=FLAGS, ops=None, anon=None):
        """A mapping of the pages [start, end), in a write section of its own."""
        with self.writing():
            vma = vm_area_alloc(self.mm)
            vma_set_range(vma, at(start), at(end), start if pgoff is None else pgoff)
            vm_flags_init(vma, flags)
            vma.vm_ops = ops
            vma_start_write(vma)
            assert not vma_iter_store_gfp(vma_iter_init(self.mm, at(start)), vma)
            self.mm.map_count += 1
            self.mm.total_vm += end - start
        self.letters[letter] = vma
        if anon is not None:
            give_anon_vma(vma, anon)
        return vma

    def name(self, letter, vma):
        """The VMA is drawn by this letter from now on."""
        self.letters[letter] = vma

    @contextmanager
    def writing(self):
        """mmap_lock (write). VMAs are not write-locked when it begins."""
        mmap_write_lock(self.mm)
        try:
            yield
        finally:
            mmap_write_unlock(self.mm)

    def vmas(self):
        """All of them, by a walk of the tree."""
        vmi: VmaIterator = vma_iter_init(self.mm, 0)
        found = []
        while (vma := vma_next(vmi)) is not None:
            found.append(vma)
        return found

    def picture(self, pages=None):
        """The mappings as they are now, and that the tree and the counts agree."""
        check_invariants(self.mm.mm_mt)
        vmas = self.vmas()
        assert self.mm.map_count == len(vmas)
        pages = pages or max((vma.vm_end // PAGE - FIRST for vma in vmas), default=0)
        drawn = ["."] * pages
        for vma in vmas:
            assert vma_is_attached(vma)
            (letter,) = [name for name, known in self.letters.items() if known is vma] or "?"
            for page in range(vma.vm_start // PAGE - FIRST, vma.vm_end // PAGE - FIRST):
                drawn[page] = letter
        return "".join(drawn)

    def locked(self, letters):
        """Whether this write section has write-locked all of these VMAs."""
        return all(self[letter].vm_lock_seq == self.mm.mm_lock_seq.sequence for letter in letters)

    def new(self, start, end, *, pgoff=None, flags=FLAGS, anon=None):
        """A range that nothing maps is to be mapped."""
        prev = find_vma_prev(self.mm, at(start))[1]
        next_ = find_vma(self.mm, at(end) - 1)
        return VmaMergeStruct(
            self.mm,
            prev,
            next_,
            at(start),
            at(end),
            start if pgoff is None else pgoff,
            flags,
            anon_vma=anon,
        )

    def change(self, letter, start, end, *, flags=None):
        """A part of a mapping gets these flags."""
        vma = self[letter]
        prev = find_vma_prev(self.mm, vma.vm_start)[1]
        vmg = vmg_of(vma, prev, find_vma(self.mm, vma.vm_end), at(start), at(end))
        if flags is not None:
            vmg.vm_flags = flags
        return vmg

    def done(self):
        """The address space ends."""
        mmput(self.mm)


def new_anon_vma():
    """An anon_vma that the test itself holds."""
    return anon_vma_alloc()


def give_anon_vma(vma, anon_vma):
    """As if a private page had been written: the VMA's chain is this one anon_vma."""
    atomic_inc(anon_vma, "refcount")
    anon_vma.num_active_vmas += 1
    vma.anon_vma = anon_vma
    vma.anon_vma_chain = (anon_vma,)


def place(vma):
    """First page, end page, page offset."""
    return vma.vm_start // PAGE - FIRST, vma.vm_end // PAGE - FIRST, vma.vm_pgoff
