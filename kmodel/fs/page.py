"""struct page: a frame of memory, with its contents.

Models:      include/linux/mm_types.h, struct page; include/linux/mm.h, get_page / put_page /
             folio_put_testzero;
             mm/page_alloc.c, alloc_page (7.2)
Guards:      `_refcount`: atomic; `contents`: one read-modify-write per store, as hardware does it; `mapping`
             and `index`: whoever owns the page, before others can find it
Invariants:  G1 `_refcount` counts page table entries, the page cache's hold and temporary users; at 0 it is
             free
Leaves out:  folios of more than one page, flags, `_mapcount`, LRU lists, zones; a slab cache stands in for
             the
             page allocator, so that leaks, double frees and failed allocations work as for every object
Read next:   fs/filemap.py, the page cache; mm/page_table.py

It is in this room, below mm/, because the page cache of a file is.
"""

from functools import partial
from typing import Any, Final

from kmodel.core import (
    POISON,
    READ_ONCE,
    Struct,
    atomic,
    atomic_dec_and_test,
    atomic_inc,
    atomic_read,
    atomic_set,
    initcall,
    kernel_struct,
    rmw,
    untraced,
)
from kmodel.fs.address_space import PAGE_SIZE
from kmodel.slab import KmemCache, kmem_cache_alloc, kmem_cache_create, kmem_cache_free

ZEROES: Final = bytes(PAGE_SIZE)


@kernel_struct
class Page(Struct):
    """One page of memory (struct page)."""

    _refcount: int = atomic(default=0)
    contents: bytes = atomic(default=ZEROES)

    # the anon_vma or the address_space it belongs to, and its place there
    mapping: Any = None
    index: int = 0
    anon: bool = untraced(default=False)

    __hash__ = object.__hash__


page_cachep: KmemCache
empty_zero_page: Page


@initcall
def page_alloc_init() -> None:
    """Create the pool of pages, and the one page that all unwritten anonymous memory reads from."""
    global page_cachep, empty_zero_page
    # A struct page is never anything else. (And such a cache hands out a whole slab at a time, as the per-CPU
    # lists of the page allocator do: faults on different CPUs do not meet here.)
    page_cachep = kmem_cache_create(
        "page", Page, typesafe_by_rcu=True, objects_per_slab=64, sheaf_capacity=128
    )
    empty_zero_page = Page()


def alloc_page(
    contents: bytes | None = None, mapping: Any = None, index: int = 0, *, anon: bool = False
) -> Page | None:
    """A page with one reference, of zeroes unless told otherwise; None without memory."""
    page: Page | None = kmem_cache_alloc(page_cachep)
    if page is None:
        return None
    page.contents = bytes(PAGE_SIZE) if contents is None else contents
    page.mapping = mapping
    page.index = index
    page.anon = anon
    atomic_set(page, "_refcount", 1)
    return page


def is_zero_page(page: Page) -> bool:
    """Whether it is the page of zeroes, which nobody counts or writes."""
    return page is empty_zero_page


def get_page(page: Page) -> None:
    """Another reference, by somebody who knows that the page has one."""
    atomic_inc(page, "_refcount")


def put_page(page: Page) -> None:
    """Drop a reference; the last one frees the page."""
    if atomic_dec_and_test(page, "_refcount"):
        page.contents = POISON  # the cache leaves what it frees as it is
        kmem_cache_free(page_cachep, page)


def page_count(page: Page) -> int:
    """Its references, at some moment."""
    return int(atomic_read(page, "_refcount"))


# ------------------------------------------------------------------------------------------------ contents


def _patched(offset: int, data: bytes, old: bytes) -> bytes:
    return old[:offset] + data + old[offset + len(data) :]


def memcpy_from_page(page: Page, offset: int, n: int) -> bytes:
    """n bytes of the page."""
    contents: bytes = READ_ONCE(page, "contents")
    return contents[offset : offset + n]


def memcpy_to_page(page: Page, offset: int, data: bytes) -> None:
    """Write into the page. Other bytes that others write at the same time stay written."""
    rmw(page, "contents", partial(_patched, offset, data), "relaxed")
