"""Reads pickles of plain data without executing code in them: CIFAR's batches, and PyTorch's files of tensors.

A pickle is a program. This interpreter supports only the instructions that build dictionaries, lists, tuples, numbers,
text, bytes and plain numpy arrays. Every instruction takes one step, so the work is bounded by the size of the file;
hashing nested tuples as dictionary keys would otherwise be exponential.
"""

import pickletools
from collections.abc import Callable, Collection
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAX_INSTRUCTIONS = 5_000_000
_NUMBERS = {"INT", "FLOAT", "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_OLD_BYTES = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(ValueError):
    """The pickle is damaged, or contains more than plain data."""


class Name(NamedTuple):
    """A global that a pickle names; it is only compared, never imported."""

    module: str
    name: str


class _Mark:
    """Marks the start of a sequence on the stack."""


class _Array:
    """An array or array type as described by a pickle.

    Attributes:
      arguments: constructor arguments.
      state: state set after construction.
    """

    def __init__(self, arguments: tuple):
        self.arguments = arguments
        self.state: object = None


_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}


def load(data: bytes) -> dict[str, object]:
    """The dictionary in a pickle, with text keys.

    Args:
      data: content of the file. Python 2 strings are returned as bytes.

    Returns:
      The dictionary; arrays are read by ``byte_table``.

    Raises:
      PickleError: if it is damaged, has more than ``MAX_INSTRUCTIONS``, or holds more than plain data.
    """
    values = interpret(data, _ARRAYS | {("_codecs", "encode")}, _reduce)
    if not isinstance(values, dict):
        raise PickleError("no dictionary")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in values.items()}


def byte_table(value: object, columns: int) -> np.ndarray | None:
    """Converts a value of ``load`` to an array ``[n, columns]`` of bytes; ``None`` if it is not such an array."""
    state = value.state if isinstance(value, _Array) else None
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, _Array) or dtype.arguments[:1] not in ((b"u1",), ("u1",)) or fortran is not False:
        return None
    if not isinstance(data, bytes) or not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != columns:
        return None
    if not isinstance(shape[0], int):
        return None
    return np.frombuffer(data, np.uint8).reshape(-1, columns) if len(data) == shape[0] * columns else None


def _key(value: object) -> str | bytes | int:
    if not isinstance(value, str | bytes | int):
        raise PickleError("a key that is neither text nor a number")
    return value


def _reduce(function: Name, arguments: tuple) -> object:
    if function == ("_codecs", "encode"):  # how Python 3 writes bytes into old pickles
        text, encoding = arguments
        if not isinstance(text, str) or encoding != "latin1":
            raise PickleError("an unexpected encoding")
        return text.encode("latin1")
    return _Array(arguments)


def _no_outside(identity: object) -> object:
    raise PickleError("it refers to something outside of it")


def interpret(
    data: bytes | BinaryIO,
    names: Collection[tuple[str, str]],
    call: Callable[[Name, tuple], object],
    outside: Callable[[object], object] = _no_outside,
) -> object:
    """Interprets one pickle.

    Args:
      data: the pickle, or an open file, which is read up to the end of the pickle.
      names: globals (module and name) that the pickle may name; they are not imported.
      call: gives the value of a call of one of them with its arguments.
      outside: gives the value that a persistent id stands for.

    Returns:
      The value.

    Raises:
      PickleError: if it is damaged, has more than ``MAX_INSTRUCTIONS``, or holds more than plain data.
    """
    try:
        return _run(data, names, call, outside)
    except PickleError:
        raise
    except Exception as error:  # an empty stack, a missing memo, nonsense
        raise PickleError(" ".join(str(error).split())[:200] or "damaged") from error


def _run(
    data: bytes | BinaryIO,
    names: Collection[tuple[str, str]],
    call: Callable[[Name, tuple], object],
    outside: Callable[[object], object],
) -> object:
    stack: list = []
    memo: dict[int, object] = {}

    def above_mark() -> list:
        place = len(stack) - 1
        while not isinstance(stack[place], _Mark):
            place -= 1
            if place < 0:
                raise PickleError("damaged")
        found = stack[place + 1 :]
        del stack[place:]
        return found

    def put_items(items: list) -> None:
        target = stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("damaged")
        target.update((_key(items[i]), items[i + 1]) for i in range(0, len(items), 2))

    def name(module: object, attribute: object) -> Name:
        if (module, attribute) not in names:
            raise PickleError(f"it asks for {module!s}.{attribute!s}"[:200])
        return Name(str(module), str(attribute))

    makers: dict[str, Callable[[], object]] = {
        "MARK": _Mark,
        "EMPTY_DICT": dict,
        "EMPTY_LIST": list,
        "LIST": above_mark,
        "TUPLE": lambda: tuple(above_mark()),
    }
    argument: Any  # its type depends on the instruction
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if count >= MAX_INSTRUCTIONS:
            raise PickleError(f"more than {MAX_INSTRUCTIONS:,} instructions")
        code = instruction.name
        if code in _NUMBERS or code in _TEXT or code in _BYTES:
            stack.append(argument)
        elif code in _OLD_BYTES:
            stack.append(argument.encode("latin1"))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _PUT:
            memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in _GET:
            stack.append(memo[argument])
        elif code in makers:
            stack.append(makers[code]())
        elif code in _TUPLES:
            size = _TUPLES[code]
            if size > len(stack):
                raise PickleError("damaged")
            found = tuple(stack[len(stack) - size :])
            del stack[len(stack) - size :]
            stack.append(found)
        elif code == "DICT":
            items = above_mark()
            stack.append({})
            put_items(items)
        elif code == "SETITEM":
            value, key = stack.pop(), stack.pop()
            put_items([key, value])
        elif code == "SETITEMS":
            put_items(above_mark())
        elif code in ("APPEND", "APPENDS"):
            values = [stack.pop()] if code == "APPEND" else above_mark()
            if not isinstance(stack[-1], list):
                raise PickleError("damaged")
            stack[-1].extend(values)
        elif code == "GLOBAL":
            stack.append(name(*argument.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(name(module, attribute))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, Name) or not isinstance(arguments, tuple):
                raise PickleError("damaged")
            stack.append(call(function, arguments))
        elif code == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Array):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict):  # the attributes of an OrderedDict are not needed
                raise PickleError("damaged")
        elif code == "BINPERSID":
            stack.append(outside(stack.pop()))
        elif code == "STOP":
            return stack.pop()
        elif code not in ("PROTO", "FRAME"):
            raise PickleError(f"it holds more than plain data (instruction {code})")
    raise PickleError("cut short")
