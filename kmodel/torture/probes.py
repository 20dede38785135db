"""Where to put uprobes: what a user asked for, or a good choice among the functions of the mapped files.

Models:      kernel/trace/trace_uprobe.c, __trace_uprobe_create: the syntax of tracefs's uprobe_events
Guards:      none; runs before any task does
Invariants:  X1 no two probes of a plan share file and offset, X2 equal files and seed give equal probes
Leaves out:  return probes, fetch arguments, reference counter offsets (refused with a message)
Read next:   torture/plan.py
"""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs

from kmodel.torture.elf import Function, NotElf, bytes_at, find_function, functions, is_elf

PAGE_SIZE = 4096
# int3: a place that holds one already cannot be probed.
UPROBE_SWBP_INSN = b"\xcc"
CLUSTER_SIZE = 12
_TRACEFS = re.compile(r"^(?P<kind>[a-z]\S*?)(?::(?P<event>\S*))?\s+(?P<place>\S+)(?P<rest>\s.*)?$")
_EVENT = re.compile(r"^(?:[A-Za-z_][A-Za-z0-9_]*/)?[A-Za-z_][A-Za-z0-9_]*$")


class BadProbe(ValueError):
    """A probe specification that cannot be used; the text says what is wrong with which part."""


@attrs.frozen
class ProbeSpec:
    """What the user asked for: a file, and a symbol or an offset in it."""

    text: str
    path: str
    symbol: str | None
    offset: int
    event: str | None = None


@attrs.frozen(order=True)
class Probe:
    """A place to probe: a file, an offset in it, and a name for people."""

    path: str
    offset: int
    name: str
    explicit: bool = False

    @property
    def in_page(self) -> int:
        """The offset within its page."""
        return self.offset % PAGE_SIZE

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.name}"


def parse_probe(text: str) -> ProbeSpec:
    """PATH:SYMBOL, PATH:SYMBOL+OFFSET, PATH:OFFSET, or tracefs's `p:NAME PATH:OFFSET`. BadProbe says what
    is wrong.
    """
    stripped = text.strip()
    event = None
    place = stripped
    tracefs = _TRACEFS.match(stripped) if re.match(r"^[a-z]\d*(:\S*)?\s", stripped) else None
    if tracefs is not None:
        kind, event, place = tracefs["kind"], tracefs["event"], tracefs["place"]
        if kind.startswith("r") or place.endswith("%return"):
            raise BadProbe(f"probe {text!r}: return probes are not supported here, only entry probes (p)")
        if not kind.startswith("p"):
            raise BadProbe(f"probe {text!r}: it must begin with 'p', not {kind!r}")
        if event is not None and not _EVENT.match(event):
            raise BadProbe(
                f"probe {text!r}: {event!r} is not an event name ([GROUP/]NAME of letters, digits, _)"
            )
        if (tracefs["rest"] or "").strip():
            raise BadProbe(f"probe {text!r}: fetch arguments ({tracefs['rest'].strip()}) are not supported")
    path, colon, target = place.rpartition(":")
    if not colon or not path or not target:
        raise BadProbe(f"probe {text!r}: expected PATH:SYMBOL, PATH:0xOFFSET or 'p:NAME PATH:0xOFFSET'")
    if target.endswith(")") and "(" in target:
        raise BadProbe(f"probe {text!r}: reference counter offsets are not supported")
    if target[0].isdigit():
        return ProbeSpec(text, path, None, _number(text, target), event)
    if tracefs is not None:
        raise BadProbe(
            f"probe {text!r}: tracefs takes an offset in the file (0x...), not the symbol {target!r}; "
            f"{path}:{target} would do"
        )
    symbol, plus, addend = target.partition("+")
    return ProbeSpec(text, path, symbol, _number(text, addend) if plus else 0, event)


def _number(text: str, digits: str) -> int:
    try:
        return int(digits, 0)
    except ValueError:
        raise BadProbe(f"probe {text!r}: {digits!r} is not an offset (0x... or decimal)") from None


def resolve(spec: ProbeSpec) -> Probe:
    """Find the place a specification names. Whether the kernel takes it is uprobe_register's to say."""
    path = str(Path(spec.path).resolve())
    if not Path(path).is_file():
        raise BadProbe(f"probe {spec.text!r}: there is no file {spec.path}")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise BadProbe(f"probe {spec.text!r}: {spec.path} cannot be read: {error.strerror}") from error
    if spec.symbol is None:
        return Probe(path, spec.offset, spec.event or hex(spec.offset), explicit=True)
    try:
        function = find_function(path, spec.symbol)
    except NotElf as error:
        raise BadProbe(f"probe {spec.text!r}: {error}") from error
    if function is None:
        raise BadProbe(f"probe {spec.text!r}: {spec.path} has no function {spec.symbol!r}")
    name = f"{spec.symbol}+{spec.offset:#x}" if spec.offset else spec.symbol
    return Probe(path, function.offset + spec.offset, name, explicit=True)


# ----------------------------------------------------------------------------------------- the default choice


@attrs.frozen
class Choice:
    """The probes of a run, by what happens to them."""

    permanent: tuple[Probe, ...]
    """Registered from start to end, hit where their file is mapped: none may ever be missed."""

    contested: tuple[tuple[Probe, ...], ...]
    """Per slot: probes of different pages at the same offset in the page, so that one address can be any of
    them.
    """

    clusters: tuple["Cluster", ...]
    """Probes that come and go, among some that stay."""

    @property
    def all(self) -> tuple[Probe, ...]:
        """Every probe once."""
        chosen = {*self.permanent, *(probe for group in self.contested for probe in group)}
        for cluster in self.clusters:
            chosen.update(cluster.permanent, cluster.churned)
        return tuple(sorted(chosen))


@attrs.frozen
class Cluster:
    """Functions that follow each other in a file, and so in the tree: some registered from start to end,
    between them
    others that are registered and unregistered all the time, so that rotations pass over the first.
    """

    permanent: tuple[Probe, ...]
    churned: tuple[Probe, ...]


def is_libc(path: str) -> bool:
    """Whether a path looks like the C library (glibc or musl)."""
    name = Path(path).name
    return bool(re.match(r"^(libc[.-]|ld-musl|libc\.musl)", name))


def probeable(path: str, found: Iterable[Function]) -> list[Probe]:
    """The functions of a file as probes, without those whose first byte is a breakpoint already."""
    with open(path, "rb") as stream:
        content = stream.read()
    return [
        Probe(path, function.offset, function.name)
        for function in found
        if content[function.offset : function.offset + 1] not in (b"", UPROBE_SWBP_INSN)
    ]


def choose(
    paths: Sequence[str],
    rng: random.Random,
    *,
    permanent: int,
    slots: int,
    per_slot: int,
    clusters: int,
    explicit: Sequence[Probe] = (),
) -> Choice:
    """Choose probes among the functions of `paths` (executable mapped files, C library or not).

    Half of the permanent ones come from the C library, spread over its text, the rest from the other files,
    so that the tree
    has several inodes. The files of explicit probes count as mapped. ValueError if no file has functions.
    """
    by_path: dict[str, list[Probe]] = {}
    for path in dict.fromkeys([*paths, *(probe.path for probe in explicit)]):
        if not is_elf(path):
            continue
        try:
            found = probeable(path, functions(path))
        except (NotElf, OSError):
            continue
        if found:
            by_path[path] = found
    if not by_path and not explicit:
        raise ValueError("none of the mapped files is an ELF file with functions that can be read here")

    fixed = list(dict.fromkeys(explicit))
    taken = {(probe.path, probe.offset) for probe in fixed}
    for path, share in _shares(by_path, max(0, permanent - len(fixed))):
        for probe in _spread(by_path[path], share, rng):
            if (probe.path, probe.offset) not in taken:
                taken.add((probe.path, probe.offset))
                fixed.append(probe)

    groups = _groups(by_path, rng, slots, per_slot, taken)
    taken |= {(probe.path, probe.offset) for group in groups for probe in group}
    return Choice(tuple(fixed), groups, _clusters(by_path, rng, clusters, taken))


def _shares(by_path: dict[str, list[Probe]], count: int) -> list[tuple[str, int]]:
    libc = [path for path in by_path if is_libc(path)]
    others = [path for path in by_path if path not in libc]
    first = libc or others[:1]
    rest = [path for path in others if path not in first]
    shares = [(path, -(-count // (2 if rest else 1) // len(first))) for path in first]
    left = count - sum(share for _path, share in shares)
    for n, path in enumerate(rest):
        share = -(-left // (len(rest) - n))
        shares.append((path, share))
        left -= share
    return [(path, share) for path, share in shares if share > 0]


def _spread(candidates: list[Probe], count: int, rng: random.Random) -> list[Probe]:
    """`count` of the candidates, one from each of `count` stretches of the file."""
    count = min(count, len(candidates))
    return [
        candidates[rng.randrange(n * len(candidates) // count, (n + 1) * len(candidates) // count)]
        for n in range(count)
    ]


def _groups(
    by_path: dict[str, list[Probe]],
    rng: random.Random,
    slots: int,
    per_slot: int,
    taken: set[tuple[str, int]],
) -> tuple[tuple[Probe, ...], ...]:
    """For each slot, probes that lie at one offset in the page but in different pages, of several files
    where possible.
    """
    at: dict[int, list[Probe]] = {}
    for probes in by_path.values():
        for probe in probes:
            if (probe.path, probe.offset) not in taken:
                at.setdefault(probe.in_page, []).append(probe)
    by_variety = sorted(at, key=lambda place: (-len({p.path for p in at[place]}), -len(at[place]), place))
    groups = []
    for place in by_variety[:slots]:
        members = list(at[place])
        rng.shuffle(members)
        chosen: list[Probe] = []
        for wanted_new_file in (True, False):
            for probe in members:
                if len(chosen) == per_slot:
                    break
                if probe not in chosen and (probe.path not in {c.path for c in chosen}) == wanted_new_file:
                    chosen.append(probe)
        groups.append(tuple(chosen))
    return tuple(groups)


def _clusters(
    by_path: dict[str, list[Probe]], rng: random.Random, count: int, taken: set[tuple[str, int]]
) -> tuple[Cluster, ...]:
    """Stretches of neighbouring functions in the largest files, every third of them permanent."""
    largest = sorted(by_path, key=lambda path: (-len(by_path[path]), path))[:2]
    chosen: list[Cluster] = []
    for n in range(count if largest else 0):
        probes = by_path[largest[n % len(largest)]]
        start = rng.randrange(max(1, len(probes) - CLUSTER_SIZE))
        members = [p for p in probes[start : start + CLUSTER_SIZE] if (p.path, p.offset) not in taken]
        taken.update((p.path, p.offset) for p in members)
        permanent = tuple(p for at, p in enumerate(members) if at % 3 == 1)
        churned = tuple(p for at, p in enumerate(members) if at % 3 != 1)
        if churned:
            chosen.append(Cluster(permanent, churned))
    return tuple(chosen)


def instruction(probe: Probe, count: int = 16) -> bytes:
    """The bytes at a probe, as many as the longest x86 instruction may need."""
    return bytes_at(probe.path, probe.offset, count)
