"""Pickles read as data: the handful of opcodes that plain data needs, interpreted here, on checked bytes.

Python's unpickler runs what a file asks for, and even with its imports restricted NumPy's own reducers follow pointers
that a file states. Here a name is only ever compared with two: a NumPy scalar is rebuilt from its bytes, everything
else is refused. What comes out holds dictionaries, lists, tuples, str, bytes, bool, int, float and None.
"""

import pickletools
from typing import Any

import numpy as np

from scalefold.errors import DataError

_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_DTYPE = "numpy.dtype"
_SCALAR_TYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "INT", "BINFLOAT", "FLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAX_DEPTH = 16
_MAX_SHARING = 64  # how many times its file's size a value may be when what it shares is written out


class _Name(str):
    """A name that the file wants to import."""


class _Dtype:
    """The type of a scalar, as the file describes it."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"


def loads(data: bytes) -> Any:
    """The value in a pickle of protocol 3 or later.

    Raises:
        DataError: the pickle is cut off or damaged, wants to load anything, is nested too deeply, contains itself, or
            shares its parts so often that written out it would be far larger than the file.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.run(opcode.name, argument)
        (value,) = machine.stack
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"no readable pickle ({type(error).__name__}: {error}); fetch it again") from None
    _Measure(_MAX_SHARING * len(data) + (1 << 20)).size(value, 0)
    return value


class _Machine:
    """The stack, the marks (stacks set aside) and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _VALUES:
            self.stack.append(_number_or_text(argument))
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif handler := getattr(self, f"_{name.lower()}", None):
            handler(argument)
        else:
            raise DataError(f"the pickle uses {name}, which plain data does not need, so the file is refused")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("the stack is too short")
        start = len(self.stack) - count
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _to_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self.marks.pop()
        return taken

    def _proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"protocol {version}")

    def _frame(self, _: int) -> None:
        """Where a frame begins is of no interest."""

    def _stop(self, _: None) -> None:
        if self.marks:
            raise ValueError("a mark was left")

    def _mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _empty_list(self, _: None) -> None:
        self.stack.append([])

    def _empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _tuple(self, _: None) -> None:
        items = self._to_mark()
        self.stack.append(tuple(items))

    def _list(self, _: None) -> None:
        items = self._to_mark()
        self.stack.append(items)

    def _dict(self, _: None) -> None:
        items = self._to_mark()
        self.stack.append({})
        self._set(items)

    def _append(self, _: None) -> None:
        self._extend(self._pop(1))

    def _appends(self, _: None) -> None:
        self._extend(self._to_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError(f"a {type(self.stack[-1]).__name__} is no list")
        self.stack[-1].extend(items)

    def _setitem(self, _: None) -> None:
        self._set(self._pop(2))

    def _setitems(self, _: None) -> None:
        self._set(self._to_mark())

    def _set(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if type(self.stack[-1]) is not dict or len(keys) != len(values):
            raise TypeError("keys and values do not belong to a dictionary")
        if any(type(key) not in (str, int) for key in keys):  # hashing shared tuples may take for ever
            raise TypeError("a key is neither text nor a whole number")
        self.stack[-1].update(zip(keys, values, strict=True))

    def _global(self, name: str) -> None:
        self.stack.append(_known(name.replace(" ", ".", 1)))

    def _stack_global(self, _: None) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name is no text")
        self.stack.append(_known(f"{module}.{name}"))

    def _reduce(self, _: None) -> None:
        name, arguments = self._pop(2)
        if type(name) is not _Name or type(arguments) is not tuple:
            raise TypeError("a call of something that is no name")
        self.stack.append(_dtype(arguments) if name == _DTYPE else _scalar(arguments))

    def _build(self, _: None) -> None:
        (state,) = self._pop(1)
        if type(self.stack[-1]) is not _Dtype or type(state) is not tuple or len(state) < 5:
            raise TypeError("a state for something that is no scalar type")
        if state[1] not in ("<", ">", "|") or state[2:5] != (None, None, None):
            raise DataError("the pickle describes a NumPy type that is no plain number, so the file is refused")
        self.stack[-1].order = state[1]


def _known(name: str) -> _Name:
    if name != _DTYPE and name not in _SCALARS:
        raise DataError(f"the pickle wants to load {name[:200]!s}; only plain data is read, so the file is refused")
    return _Name(name)


def _dtype(arguments: tuple) -> _Dtype:
    code = arguments[0] if arguments else None
    if type(code) is not str or code not in _SCALAR_TYPES:
        raise DataError(f"the pickle describes a NumPy type {_short(code)} that is no plain number, so it is refused")
    return _Dtype(code)


def _scalar(arguments: tuple) -> bool | int | float:
    dtype, raw = arguments
    if type(dtype) is not _Dtype or type(raw) is not bytes:
        raise TypeError("a NumPy scalar without type or bytes")
    if len(raw) != int(dtype.code[1:]):
        raise ValueError(f"{len(raw)} bytes for a NumPy scalar of type {dtype.code}")
    return np.frombuffer(raw, dtype=np.dtype(dtype.order + dtype.code))[0].item()


def _number_or_text(value: Any) -> Any:
    if type(value) is int and not -(1 << 63) <= value < 1 << 64:
        raise ValueError("a whole number of more than 64 bits")
    if type(value) is str:
        value.encode()  # lone surrogates are no text
    return value


def _short(value: Any) -> str:
    return repr(value[:20]) if type(value) is str else type(value).__name__


class _Measure:
    """Size of a value when everything that it shares is written out; every part is looked at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.known: dict[int, tuple[int, int]] = {}  # id -> size, levels below
        self.open: set[int] = set()

    def size(self, value: Any, depth: int) -> tuple[int, int]:
        """(size, levels) of a value that lies ``depth`` levels deep. Raises DataError beyond a limit."""
        if type(value) in (_Name, _Dtype):
            raise DataError("the pickle holds a name or a type in the place of data, so the file is refused")
        if type(value) not in (dict, list, tuple):
            return (len(value) if type(value) in (str, bytes) else 1) + 1, 0
        if id(value) not in self.known:
            self.known[id(value)] = self._container(value, depth)
        size, levels = self.known[id(value)]
        self._check_depth(depth + levels)
        return size, levels

    def _container(self, value: Any, depth: int) -> tuple[int, int]:
        self._check_depth(depth)
        if id(value) in self.open:
            raise DataError("the pickle contains itself, so the file is refused")
        self.open.add(id(value))
        items = [*value.keys(), *value.values()] if type(value) is dict else value
        parts = [self.size(item, depth + 1) for item in items]
        self.open.remove(id(value))
        total = 1 + sum(size for size, _ in parts)
        if total > self.limit:
            raise DataError("the pickle repeats its parts so often that it would not fit in memory, so it is refused")
        return total, 1 + max((levels for _, levels in parts), default=0)

    def _check_depth(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise DataError(f"the pickle is nested more than {_MAX_DEPTH} levels deep, so the file is refused")
