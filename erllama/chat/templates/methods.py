"""The methods and functions of chat templates, and no others.

Each gives what Python's of that name gives, and pays its machine first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from string import Formatter
from typing import Final, TypeVar, cast

from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import safe_range
from markupsafe import Markup

from erllama.chat.templates.limits import MAX_CHARACTERS, Function, LimitExceeded, Namespace
from erllama.chat.templates.machine import Machine

T = TypeVar("T")

# Bytes of one part of a text that was split, besides its characters.
PART_BYTES: Final = 56
_SPACES: Final = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
LINE_ENDS: Final = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# Of format(): alignment, sign, a width, a precision and a kind; no field within.
_SPECIFICATION = re.compile(r"(?:.?[<>=^])?[-+ ]?[#]?0?[0-9]{0,3}[,_]?(?:\.[0-9]{1,2})?[bcdeEfFgGnosxX%]?")
# Directives of strftime without the widths that C libraries add to them.
_DATE = re.compile(r"(?:[^%]|%[-#]?[A-Za-z%])*")


def small(value: T, what: str, most: int) -> T:
    """An argument that decides how much is done, if it is small."""
    size = len(value) if isinstance(value, str) else abs(value) if isinstance(value, int | float) else 0
    if size > most:
        raise LimitExceeded(f"the template asks for {what} of more than {most}")
    return value


def count_any(text: str, characters: str) -> int:
    return sum(map(text.count, characters)) if len(text) > MAX_CHARACTERS else len(text)


def replaced(machine: Machine, text: str, old: str, new: str, count: object = -1) -> str:
    times = text.count(old)
    growth = 5 * len(new) if type(text) is Markup else len(new) - len(old)
    machine.room(len(text) + max(times * growth, 0), not (text.isascii() and new.isascii()))
    return text.replace(old, new, cast(int, count))


def _plain(name: str) -> Callable[..., object]:
    """A method of texts that makes no more than a few texts of their length."""

    def run(machine: Machine, text: str, *args: object, **kwargs: object) -> object:
        for argument in args:
            machine.operand(argument)
        machine.room(len(text), not text.isascii())
        result = getattr(text, name)(*args, **kwargs)
        return machine.made(result) if isinstance(result, str) else result

    return run


def _looking(name: str) -> Callable[..., object]:
    """A method of texts that makes no text."""

    def run(machine: Machine, text: str, *args: object) -> object:
        for argument in args:
            machine.operand(argument)
        machine.operand(text)
        return getattr(text, name)(*args)

    return run


def _stripping(name: str) -> Callable[..., object]:
    def run(machine: Machine, text: str, chars: object = None, /) -> object:
        machine.room(len(text), not text.isascii())
        return getattr(text, name)(small(chars, "a strip", MAX_CHARACTERS))

    return run


def _splitting(name: str) -> Callable[..., object]:
    def run(machine: Machine, text: str, sep: object = None, maxsplit: object = -1) -> object:
        parts = count_any(text, _SPACES) if sep is None else text.count(cast(str, sep)) if sep else 0
        if isinstance(maxsplit, int) and maxsplit >= 0:
            parts = min(parts, maxsplit)
        machine.room(len(text), not text.isascii())
        machine.spend(PART_BYTES * parts)
        return getattr(text, name)(sep, maxsplit)

    return run


def _splitlines(machine: Machine, text: str, keepends: object = False) -> object:
    machine.room(len(text), not text.isascii())
    machine.spend(PART_BYTES * count_any(text, LINE_ENDS))
    return text.splitlines(bool(keepends))


def _str_join(machine: Machine, text: str, iterable: object, /) -> object:
    parts = machine.drawn(iterable)
    for index, part in enumerate(parts):
        if not isinstance(part, str):
            raise TypeError(f"sequence item {index}: expected str instance, {type(part).__name__} found")
    return machine.joined(text, cast("list[str]", parts))


def _str_replace(machine: Machine, text: str, old: object, new: object, count: object = -1, /) -> object:
    for argument in (old, new):
        if not isinstance(argument, str):
            raise TypeError(f"replace() argument must be str, not {type(argument).__name__}")
    return replaced(machine, text, cast(str, old), cast(str, new), count)


def _padding(name: str) -> Callable[..., object]:
    """A method of texts that makes one of some width."""

    def run(machine: Machine, text: str, width: object, *fill: object) -> object:
        if isinstance(width, int):
            machine.room(max(len(text), width))
        return getattr(text, name)(width, *fill)

    return run


def _str_format(machine: Machine, text: str, *args: object, **kwargs: object) -> object:
    """Fields that name a value and nothing within it: attributes and items of values are not reached so."""
    written, number = [], 0
    for before, field, specification, conversion in Formatter().parse(text):
        machine.tick()
        written.append(before)
        if field is None:
            continue
        if not field:
            field, number = str(number), number + 1
        value = args[int(field)] if field.isdigit() else kwargs[field]
        if not _SPECIFICATION.fullmatch(specification or ""):
            raise LimitExceeded(f"a format takes no {specification!r:.40}; give a width of up to three digits")
        if conversion not in (None, "s"):
            raise LimitExceeded(f"a format takes no conversion {conversion!r:.10}")
        if conversion == "s" or type(value) not in (str, int, float):
            value = machine.text(value)
        written.append(machine.made(format(value, specification or "")))
    return machine.joined("", written)


def _search(name: str) -> Callable[..., object]:
    def run(machine: Machine, items: list[object], value: object, *bounds: object) -> object:
        # What is not found is told in the error.
        machine.might_take(10 * machine.weigh(value).text)
        machine.weigh(items)
        return getattr(items, name)(value, *bounds)

    return run


def _get(machine: Machine, mapping: dict[object, object], key: object, default: object = None, /) -> object:
    return mapping.get(machine.key(key), default)


def _view(name: str) -> Callable[..., object]:
    return lambda machine, mapping: getattr(mapping, name)()


def _cycle(machine: Machine, loop: LoopContext, *args: object) -> object:
    return loop.cycle(*args)


def _changed(machine: Machine, loop: LoopContext, *value: object) -> object:
    for part in value:
        machine.operand(part)
    return loop.changed(*value)


# -- functions


class RaisedByTemplate(Exception):  # noqa: N818
    """`raise_exception(message)`."""


def _raise_exception(machine: Machine, message: object) -> object:
    raise RaisedByTemplate(machine.text(message))


def _strftime_now(machine: Machine, format: object) -> object:
    if not isinstance(format, str):
        raise TypeError(f"strftime() argument 1 must be str, not {type(format).__name__}")
    if len(format) > MAX_CHARACTERS or not _DATE.fullmatch(format):
        raise LimitExceeded(f"a date takes up to {MAX_CHARACTERS} characters, of directives without widths")
    return datetime.now().strftime(format)


def _joiner(machine: Machine, sep: object = ", ") -> object:
    used: list[bool] = []

    def run(machine: Machine) -> object:
        if used:
            return sep
        used.append(True)
        return ""

    machine.spend(512)
    return Function(run, "joiner")


def _range(machine: Machine, *bounds: object) -> object:
    return safe_range(*cast("tuple[int, ...]", bounds))


def _pairs(machine: Machine, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[object, object]:
    if len(args) > 1:
        raise TypeError(f"dict expected at most 1 argument, got {len(args)}")
    pairs: dict[object, object] = {}
    for source in (*args, kwargs):
        items = source.items() if isinstance(source, dict) else source
        for index, item in enumerate(machine.drawn(items)):
            pair = machine.drawn(item)
            if len(pair) != 2:
                raise ValueError(
                    f"dictionary update sequence element #{index} has length {len(pair)}; 2 is required"
                )
            machine.spend(128)
            pairs[machine.key(pair[0])] = pair[1]
    return pairs


def _dict(machine: Machine, /, *args: object, **kwargs: object) -> object:
    return _pairs(machine, args, kwargs)


def _namespace(machine: Machine, /, *args: object, **kwargs: object) -> object:
    machine.spend(512)
    return Namespace(cast("dict[str, object]", _pairs(machine, args, kwargs)))


def _generation(machine: Machine, /, caller: Macro) -> object:
    return machine.call(None, caller)


FUNCTIONS: Final[Mapping[str, Function]] = {
    name: Function(run, name)
    for name, run in cast(
        "dict[str, Callable[..., object]]",
        {
            "dict": _dict,
            "joiner": _joiner,
            "namespace": _namespace,
            "raise_exception": _raise_exception,
            "range": _range,
            "strftime_now": _strftime_now,
        },
    ).items()
}
GENERATION: Final = Function(_generation, "generation")


_TEXT_METHODS: Final[dict[str, Callable[..., object]]] = {
    **{name: _plain(name) for name in ["capitalize", "casefold", "lower", "swapcase", "title", "upper"]},
    **{name: _plain(name) for name in ["partition", "removeprefix", "removesuffix", "rpartition"]},
    **{
        name: _looking(name)
        for name in [
            "count",
            "endswith",
            "find",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "islower",
            "isnumeric",
            "isspace",
            "istitle",
            "isupper",
            "rfind",
            "rindex",
            "startswith",
        ]
    },
    **{name: _stripping(name) for name in ("lstrip", "rstrip", "strip")},
    **{name: _splitting(name) for name in ("rsplit", "split")},
    **{name: _padding(name) for name in ("center", "ljust", "rjust", "zfill")},
    "format": _str_format,
    "join": _str_join,
    "replace": _str_replace,
    "splitlines": _splitlines,
}
METHODS: Final[dict[type, dict[str, Callable[..., object]]]] = {
    str: _TEXT_METHODS,
    Markup: _TEXT_METHODS,
    list: {"count": _search("count"), "index": _search("index")},
    tuple: {"count": _search("count"), "index": _search("index")},
    dict: {"get": _get, "items": _view("items"), "keys": _view("keys"), "values": _view("values")},
    LoopContext: {"changed": _changed, "cycle": _cycle},
}
