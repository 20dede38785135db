"""The page cache: the pages of a file that somebody mapped, and what was written to them.

Models:      mm/filemap.c, filemap_get_folio, filemap_add_folio, filemap_read_folio; mm/truncate.c,
             truncate_inode_pages_final (7.2)
Guards:      mapping.i_pages: mapping.i_pages_lock
Invariants:  P1 a page in i_pages holds one reference for being there, P2 at most one page per index
Leaves out:  read-ahead, writeback (pages stay until the inode goes), locks and states of pages: a page is
             read before it is put in, so that whoever finds it finds it up to date
Read next:   mm/memory.py, which maps these pages

Only pages that were faulted in are here; the rest of a file is read from its source when asked for.
"""

from typing import Any

from kmodel.fs.address_space import PAGE_SHIFT, PAGE_SIZE, AddressSpace, read_mapping_page
from kmodel.fs.page import Page, alloc_page, get_page, memcpy_from_page, put_page
from kmodel.sync import spin_lock, spin_unlock


def _cached(mapping: AddressSpace, index: int) -> Page | None:
    try:
        page: Page = mapping.i_pages[index]
    except KeyError:
        return None
    return page


def filemap_get_page(mapping: AddressSpace, index: int) -> Page | None:
    """The cached page with a reference for the caller, or None if it is not cached."""
    spin_lock(mapping.i_pages_lock)
    page = _cached(mapping, index)
    if page is not None:
        get_page(page)
    spin_unlock(mapping.i_pages_lock)
    return page


def filemap_read_page(mapping: AddressSpace, index: int) -> Page | None:
    """Read the page into the cache: it, with a reference for the caller, or None without memory. Sleeps."""
    page = alloc_page(read_mapping_page(mapping, index), mapping, index)
    if page is None:
        return None
    spin_lock(mapping.i_pages_lock)
    raced = _cached(mapping, index)
    if raced is None:
        get_page(page)  # the cache's
        mapping.i_pages[index] = page
    else:
        get_page(raced)
    spin_unlock(mapping.i_pages_lock)
    if raced is not None:
        put_page(page)
        return raced
    return page


def filemap_overlay(mapping: AddressSpace, offset: int, data: bytes) -> bytes:
    """Bytes of the file's source from `offset`, as the cached pages say they are by now."""
    if not mapping.i_pages:
        return data
    parts, at, end = [], offset, offset + len(data)
    while at < end:
        stop = min((at | (PAGE_SIZE - 1)) + 1, end)
        page = filemap_get_page(mapping, at >> PAGE_SHIFT)
        if page is None:
            parts.append(data[at - offset : stop - offset])
        else:
            parts.append(memcpy_from_page(page, at & (PAGE_SIZE - 1), stop - at))
            put_page(page)
        at = stop
    return b"".join(parts)


def truncate_inode_pages_final(mapping: Any) -> None:
    """The inode ends: drop every cached page."""
    if not mapping.i_pages:
        return
    spin_lock(mapping.i_pages_lock)
    pages = list(mapping.i_pages.values())
    mapping.i_pages.clear()
    spin_unlock(mapping.i_pages_lock)
    for page in pages:
        put_page(page)
