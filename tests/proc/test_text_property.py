"""Any text that a kernel could print comes back from the model: R1, over generated address spaces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kmodel.core import boot
from kmodel.mm import MmStruct, mmput
from kmodel.proc import maps_variants, proc_maps, proc_maps_reads
from kmodel.rcu import rcu_barrier

PAGE = 0x1000

ascii_characters = st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\`$[]")
printable = st.text(ascii_characters, min_size=1)
file_names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1).map(
    lambda name: "/" + name.replace("\n", "\\012")
)
anonymous = st.one_of(
    st.none(), printable.map("[anon:{}]".format), st.sampled_from(["[vdso]", "[vvar]", "[uprobes]"])
)
mappings = st.lists(
    st.tuples(
        st.integers(0, 40),  # pages free before it
        st.integers(1, 1 << 20),  # pages
        st.text("r-", min_size=1, max_size=1),
        st.text("w-", min_size=1, max_size=1),
        st.text("x-", min_size=1, max_size=1),
        st.one_of(
            anonymous,
            st.tuples(
                file_names,
                st.sampled_from("ps"),
                st.integers(0, (1 << 51) - (1 << 21)),  # pages into the file
                st.tuples(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF)),
                st.integers(1, (1 << 64) - 1),
            ),
        ),
    ),
    min_size=1,
    max_size=40,
)


def text_of(spaces):
    """What a kernel would print."""
    lines, place = [], 0x400000
    for gap, pages, r, w, x, what in spaces:
        start = place + gap * PAGE
        place = start + pages * PAGE
        file = what if isinstance(what, tuple) else (what, "p", 0, (0, 0), 0)
        name, kind, offset, (major, minor), ino = file
        head = f"{start:08x}-{place:08x} {r}{w}{x}{kind} {offset * PAGE:08x} {major:02x}:{minor:02x} {ino} "
        lines.append(head if name is None else head.ljust(72) + " " + name)
    return "\n".join(lines) + "\n"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(mappings)
def test_every_text_comes_back(spaces):
    """For each variant, and however it is read."""
    boot()
    text = text_of(spaces)
    mm = MmStruct.from_proc_maps(text)
    assert [proc_maps(mm, variant) for variant in maps_variants()] == [text] * 3
    assert b"".join(proc_maps_reads(mm, 333)) == text.encode()
    mmput(mm)
    rcu_barrier()
