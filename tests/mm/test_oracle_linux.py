"""System calls recorded on Linux 6.18, repeated on the model: same errno, same maps after every step."""

import gzip
import json
from pathlib import Path

import pytest

from kmodel.core import boot, kernel_warnings
from kmodel.fs import open_file
from kmodel.mm import (
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    flags,
    handle_mm_fault,
    mm_alloc,
    mmap,
    mprotect,
    mremap,
    munmap,
)
from kmodel.mm.from_proc_maps import parse_maps
from kmodel.mm.maple_tree import check_invariants
from kmodel.proc import proc_maps

PAGE = 4096
ARENA = 0x10_0000_0000
DATA = Path(__file__).parent.parent / "data" / "vma-linux-6.18.json.gz"
SEQUENCES = json.loads(gzip.decompress(DATA.read_bytes()))["sequences"]


def prot_of(text):
    return sum(bit for letter, bit in zip("rwx", (1, 2, 4), strict=True) if letter in text)


def touch(mm, address):
    """A byte is written, where that is possible."""
    handle_mm_fault(mm, address, write=True)


def do(mm, files, step):
    """One recorded step on the model: its errno."""
    address = ARENA + step["page"] * PAGE
    try:
        match step["op"]:
            case "mmap":
                bits = sum(getattr(flags, f"MAP_{name}") for name in step["flags"])
                file = files[step["file"]] if step["file"] else None
                mmap(mm, address, step["pages"] * PAGE, prot_of(step["prot"]), bits, file, step["pgoff"])
            case "munmap":
                munmap(mm, address, step["pages"] * PAGE)
            case "mprotect":
                mprotect(mm, address, step["pages"] * PAGE, prot_of(step["prot"]))
            case "mremap":
                mremap(
                    mm,
                    address,
                    step["pages"] * PAGE,
                    step["new_pages"] * PAGE,
                    MREMAP_MAYMOVE | MREMAP_FIXED,
                    ARENA + step["new_page"] * PAGE,
                )
            case "touch":
                touch(mm, address)
    except OSError as error:
        return error.errno
    return 0


def maps_of(mm):
    """The model's maps in the form of the recording."""
    names = {"/A": "A", "/B": "B", "/dev/zero (deleted)": "shm", "": None}
    found = []
    for line in parse_maps(proc_maps(mm)):
        name = names[line.name]
        offset = None if name == "shm" else line.offset // PAGE
        found.append([(line.start - ARENA) // PAGE, (line.end - ARENA) // PAGE, line.perms, offset, name])
    return found


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: f"seed{sequence['seed']}")
def test_the_model_does_what_linux_did(sequence):
    """P11: every step of the recorded sequence leaves the same mappings and gives the same errno."""
    boot()
    mm = mm_alloc()
    files = {name: open_file(f"/{name}", size=512 * PAGE) for name in "AB"}
    for number, step in enumerate(sequence["steps"]):
        call = {key: value for key, value in step.items() if key != "maps"}
        assert do(mm, files, step) == step["errno"], f"step {number}: {call}"
        assert maps_of(mm) == step["maps"], f"step {number}: {call}"
        check_invariants(mm.mm_mt)
        assert mm.map_count == len(step["maps"])
    assert kernel_warnings() == ()
