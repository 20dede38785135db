"""`@kernel_struct`: C structs as attrs slots classes whose fields an engine can watch.

Models:      nothing in Linux; it is the model's notion of "a struct in shared memory"
Guards:      none; see each struct
Invariants:  T1 a field outside the declaration cannot be set (slots), T2 two structs are equal only if
             identical
Leaves out:  layout, alignment and cache lines (simulate/ adds those)
Read next:   core/access.py, the accesses that carry a memory ordering

A plain attribute read or write of a kernel_struct *is* the kernel's plain access. On the threads engine it
costs nothing
extra: the class has ordinary slots. A traced engine replaces the slot descriptors of every registered class
by `TracedField`
for the length of a run, and puts them back.

Four kinds of field:
    name: int = 0                             plain memory, watched
    name: int = atomic(default=0)             also the target of read-modify-write operations, watched
    name: X = embedded(factory=X)             a struct inside this one: reading the attribute is address
    arithmetic, not a load
    name: Any = untraced(default=None)        the model's own bookkeeping, or constant for the object's life:
    not watched
"""

import sysconfig
import threading
import types
from collections.abc import Callable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    cast,
    dataclass_transform,
    overload,
)

import attrs

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def field(**kwargs: Any) -> Any:
    """A watched field with attrs' own options (default, factory, kw_only, ...)."""
    return attrs.field(**kwargs)


def atomic(*, default: Any = attrs.NOTHING) -> Any:
    """A watched field that xchg, cmpxchg, atomic_* and refcount_* may change (atomic_t, refcount_t, hprobe
    state, ...)."""
    return attrs.field(default=default, metadata={"k": "atomic"})


def embedded(*, factory: Callable[[], Any], init: Literal[False] = False) -> Any:
    """A struct embedded by value; never reassigned, so naming it is no memory access."""
    return attrs.field(factory=factory, init=init, metadata={"k": "embedded"})


def untraced(
    *,
    default: Any = attrs.NOTHING,
    factory: Callable[[], Any] | None = None,
    init: bool = True,
) -> Any:
    """A field that engines do not watch: constants of the object's life and the model's own bookkeeping."""
    if factory is not None:
        return attrs.field(factory=factory, init=init, metadata={"k": "untraced"})
    return attrs.field(default=default, init=init, metadata={"k": "untraced"})


class KernelObject:
    """Base of every kernel_struct, through `Struct` or `Pooled`."""

    if not TYPE_CHECKING:
        __slots__ = ()

    # Filled in by kernel_struct for each class:
    __k_slots__: ClassVar[dict[str, Any]] = {}  # watched field -> original slot descriptor
    __k_embedded__: ClassVar[tuple[str, ...]] = ()  # fields that are structs by value
    # fields that read-modify-write operations may change; an immortal_dict, because each of those looks here
    __k_atomic__: ClassVar[Mapping[str, None]] = {}
    _k_lock: Any  # makes read-modify-write operations on this object atomic (threads engine)
    _k_id: Any  # stable name of this object within one traced run
    _k_gen: int  # how often it was allocated and freed: even is live, odd is freed
    _k_slab: Any  # the slab it was allocated from, or None; kfree() gives it back there

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {hex(ptr(self))}>"


if TYPE_CHECKING:

    class Struct(KernelObject):
        """Base of structs that are few, or owned by one task."""

    class Pooled(KernelObject):
        """Base of structs that many tasks read at once and that live in a kmem_cache pool."""

else:

    class Struct(KernelObject):
        """Base of structs that are few, or owned by one task."""

        __slots__ = ("_k_gen", "_k_id", "_k_lock", "_k_slab")

    if FREE_THREADED:
        # Free-threaded CPython 3.13 makes module objects immortal once a thread has started: reading a shared
        # one moves no
        # reference count between caches (measured: x1.94 with two readers, ordinary slots objects x1.2). The
        # price: such an
        # object is never freed, so only pooled structs may be of this kind; and it has a module's __dict__,
        # so a misspelt
        # field would be accepted: mypy, the traced engines and kmem_cache_free check what slots would have.
        class Pooled(KernelObject, types.ModuleType):
            """Base of structs that many tasks read at once and that live in a kmem_cache pool."""

            __slots__ = ("_k_gen", "_k_id", "_k_lock", "_k_slab")

            def __init__(self) -> None:
                pass

            __repr__ = KernelObject.__repr__

    else:

        class Pooled(Struct):
            """Base of structs that many tasks read at once and that live in a kmem_cache pool."""

            __slots__ = ()


def immortal_dict[K, V](contents: Mapping[K, V]) -> dict[K, V]:
    """A dict that many threads can look into without waiting for each other.

    On free-threaded 3.13 a counted object found through a class attribute or in a dict costs a reader the
    lock of all types, or of the dict. A module's dict is immortal once a thread has started; its keys and
    values should be, too.
    """
    table = cast("dict[K, V]", types.ModuleType("kmodel_table").__dict__)
    table.clear()
    table.update(contents)
    return table


_registry: list[type[KernelObject]] = []
_registry_hook: Callable[[type[KernelObject]], None] | None = None


def registered_structs() -> tuple[type[KernelObject], ...]:
    """Every kernel_struct class, in definition order."""
    return tuple(_registry)


def _pre_init(self: Any) -> None:
    self._k_id = None
    self._k_gen = 0
    self._k_slab = None
    self._k_lock = threading.Lock()


def _pre_init_unlocked(self: Any) -> None:
    self._k_id = None
    self._k_gen = 0
    self._k_slab = None


@dataclass_transform(eq_default=False, field_specifiers=(field, atomic, embedded, untraced, attrs.field))
def kernel_struct[T: type[Any]](cls: T) -> T:
    """Class decorator: declare a struct of the modelled kernel (see the module's text for the kinds of
    field).

    The class must derive from `Struct` or `Pooled`, or from another kernel_struct: inheritance is "embedded
    at offset zero",
    so container_of() is the identity.
    """
    if not issubclass(cls, KernelObject):
        raise TypeError(f"{cls.__name__}: a kernel_struct derives from Struct or Pooled")
    annotations = cls.__dict__.get("__annotations__", {})
    own_kinds = {
        name: (getattr(cls.__dict__.get(name), "metadata", None) or {}).get("k", "plain")
        for name, annotation in annotations.items()
        if "ClassVar" not in str(annotation)
    }
    inherited_atomic = cast("dict[str, None]", getattr(cls, "__k_atomic__", {}))
    atomics = {*inherited_atomic, *(name for name, kind in own_kinds.items() if kind == "atomic")}
    if "__attrs_pre_init__" not in cls.__dict__:
        setattr(cls, "__attrs_pre_init__", _pre_init if atomics else _pre_init_unlocked)  # noqa: B010  # unknown to type[Any]
    built = attrs.define(eq=False, repr=False, slots=True, weakref_slot=False)(cls)
    slots = dict(getattr(built, "__k_slots__", {}))
    for name, kind in own_kinds.items():
        if kind in ("plain", "atomic"):
            slots[name] = built.__dict__[name]
    built.__k_slots__ = slots
    built.__k_atomic__ = immortal_dict(dict.fromkeys(sorted(atomics)))
    built.__k_embedded__ = tuple(
        f.name for f in attrs.fields(cast("Any", built)) if f.metadata.get("k") == "embedded"
    )
    _registry.append(built)
    if _registry_hook is not None:
        _registry_hook(built)
    return built


def raw_get(obj: KernelObject, name: str) -> Any:
    """Read a field without the engine seeing it (engines, oracles, dumps)."""
    # Not dict.get(): on free-threaded 3.13 it takes 20 us on a dict that another thread created (measured).
    slots = type(obj).__k_slots__
    return slots[name].__get__(obj) if name in slots else getattr(obj, name)


def raw_set(obj: KernelObject, name: str, value: Any) -> None:
    """Write a field without the engine seeing it."""
    slots = type(obj).__k_slots__
    if name in slots:
        slots[name].__set__(obj, value)
    else:
        setattr(obj, name, value)


def ptr(obj: KernelObject | None) -> int:
    """The address of a struct as a number: a key to compare, never to follow. NULL is 0.

    On the threads engine this is the interpreter's id(); in a traced run it is derived from who created the
    object and when,
    so that it is the same in every execution.
    """
    if obj is None:
        return 0
    stable = obj._k_id
    return id(obj) if stable is None else cast("int", stable)


# --------------------------------------------------------------------------------------------- ad-hoc structs

_variable_classes: dict[tuple[str, ...], type[Any]] = {}


def variables(**initial: Any) -> Any:
    """An ad-hoc kernel_struct for experiments: `v = variables(x=0, y=0)` has the watched atomic fields x and
    y."""
    names = tuple(initial)
    cls = _variable_classes.get(names)
    if cls is None:
        namespace: dict[str, Any] = {"__annotations__": dict.fromkeys(names, Any)}
        namespace |= {name: atomic() for name in names}
        cls = kernel_struct(type("Variables", (Struct,), namespace))
        _variable_classes[names] = cls
    return cls(**initial)


# -------------------------------------------------------------------------------------------- shared integers

_SHARED_INTS_MAX = 1 << 16
_shared_ints: dict[int, int] = types.ModuleType("kmodel_shared_ints").__dict__  # type: ignore[assignment]


def shared_int(value: int) -> int:
    """The same number, as an object that many threads can read without contending for its reference count.

    On free-threaded 3.13 a constant of compiled code is immortal, an integer computed at run time is not: two
    threads that
    read the same vm_start run four times slower than one. Addresses, page offsets and tree pivots pass
    through here where they
    are stored. Bounded: after 65,536 different values numbers are returned as they are (correct, only slower
    to share).
    """
    if not FREE_THREADED or -5 <= value <= 256:
        return value
    try:
        return _shared_ints[value]
    except KeyError:
        pass
    if len(_shared_ints) >= _SHARED_INTS_MAX:
        return value
    constant = cast("int", eval(repr(value)))
    # The key as well as the value: a lookup that meets a counted key of another thread takes the lock of the
    # dict, and then everybody waits for everybody (measured: 20 times slower).
    return _shared_ints.setdefault(constant, constant)


def slots_are_clean(obj: KernelObject) -> bool:
    """Whether no misspelt field was set on a pooled object (which, being a module object, would accept
    it)."""
    return not getattr(obj, "__dict__", None)


@overload
def container[T](obj: None, cls: type[T]) -> None: ...
@overload
def container[T](obj: KernelObject, cls: type[T]) -> T: ...
def container[T](obj: KernelObject | None, cls: type[T]) -> T | None:
    """container_of() for a member embedded at offset zero by inheritance: the same object, seen as `cls`."""
    return cast("T | None", obj)
