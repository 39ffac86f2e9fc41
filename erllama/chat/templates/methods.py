"""The methods of texts, lists and mappings in chat templates, and the functions.

Each returns what Python's method or function of the same name returns, and charges the machine first. Templates
have no other methods and functions. `filters` puts them into the tables.
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

from erllama.chat.templates.limits import MAX_CHARACTERS, LimitExceeded
from erllama.chat.templates.machine import Machine
from erllama.chat.templates.values import Function, Namespace

T = TypeVar("T")

# Bytes of one part of a split text, besides its characters.
PART_BYTES: Final = 56
_SPACES: Final = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
LINE_ENDS: Final = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# Specification of format(): alignment, sign, width, precision and type, without nested fields.
_SPECIFICATION = re.compile(r"(?:.?[<>=^])?[-+ ]?[#]?0?[0-9]{0,3}[,_]?(?:\.[0-9]{1,2})?[bcdeEfFgGnosxX%]?")
# Directives of strftime, without the widths that C libraries support.
_DATE = re.compile(r"(?:[^%]|%[-#]?[A-Za-z%])*")


def check_small(value: T, what: str, limit: int) -> T:
    """Return an argument that determines the amount of work; raise LimitExceeded if it is larger than `limit`."""
    size = len(value) if isinstance(value, str) else abs(value) if isinstance(value, int | float) else 0
    if size > limit:
        raise LimitExceeded(f"the template uses {what} larger than {limit}")
    return value


def count_any(text: str, characters: str) -> int:
    return sum(map(text.count, characters)) if len(text) > MAX_CHARACTERS else len(text)


def replace_text(machine: Machine, text: str, old: str, new: str, count: object = -1) -> str:
    times = text.count(old)
    growth = 5 * len(new) if type(text) is Markup else len(new) - len(old)
    machine.charge_text(len(text) + max(times * growth, 0), not (text.isascii() and new.isascii()))
    return text.replace(old, new, cast(int, count))


def _transform_method(name: str) -> Callable[..., object]:
    """Return a method of texts whose results are about as long as the text."""

    def run(machine: Machine, text: str, *args: object, **kwargs: object) -> object:
        for argument in args:
            machine.charge_operand(argument)
        machine.charge_text(len(text), not text.isascii())
        result = getattr(text, name)(*args, **kwargs)
        return machine.charge_result(result) if isinstance(result, str) else result

    return run


def _inspect_method(name: str) -> Callable[..., object]:
    """Return a method of texts that makes no text."""

    def run(machine: Machine, text: str, *args: object) -> object:
        for argument in args:
            machine.charge_operand(argument)
        machine.charge_operand(text)
        return getattr(text, name)(*args)

    return run


def _strip_method(name: str) -> Callable[..., object]:
    def run(machine: Machine, text: str, chars: object = None, /) -> object:
        machine.charge_text(len(text), not text.isascii())
        return getattr(text, name)(check_small(chars, "an argument of strip", MAX_CHARACTERS))

    return run


def _split_method(name: str) -> Callable[..., object]:
    def run(machine: Machine, text: str, sep: object = None, maxsplit: object = -1) -> object:
        parts = count_any(text, _SPACES) if sep is None else text.count(cast(str, sep)) if sep else 0
        if isinstance(maxsplit, int) and maxsplit >= 0:
            parts = min(parts, maxsplit)
        machine.charge_text(len(text), not text.isascii())
        machine.charge_bytes(PART_BYTES * parts)
        return getattr(text, name)(sep, maxsplit)

    return run


def _splitlines(machine: Machine, text: str, keepends: object = False) -> object:
    machine.charge_text(len(text), not text.isascii())
    machine.charge_bytes(PART_BYTES * count_any(text, LINE_ENDS))
    return text.splitlines(bool(keepends))


def _str_join(machine: Machine, text: str, iterable: object, /) -> object:
    parts = machine.to_list(iterable)
    for index, part in enumerate(parts):
        if not isinstance(part, str):
            raise TypeError(f"sequence item {index}: expected str instance, {type(part).__name__} found")
    return machine.join(text, cast("list[str]", parts))


def _str_replace(machine: Machine, text: str, old: object, new: object, count: object = -1, /) -> object:
    for argument in (old, new):
        if not isinstance(argument, str):
            raise TypeError(f"replace() argument must be str, not {type(argument).__name__}")
    return replace_text(machine, text, cast(str, old), cast(str, new), count)


def _pad_method(name: str) -> Callable[..., object]:
    """Return a method of texts that makes a text of a given width."""

    def run(machine: Machine, text: str, width: object, *fill: object) -> object:
        if isinstance(width, int):
            machine.charge_text(max(len(text), width))
        return getattr(text, name)(width, *fill)

    return run


def _str_format(machine: Machine, text: str, *args: object, **kwargs: object) -> object:
    """`str.format`, with fields that name a value. A field cannot reach attributes or items of a value."""
    parts, number = [], 0
    for before, field, specification, conversion in Formatter().parse(text):
        machine.charge_steps()
        parts.append(before)
        if field is None:
            continue
        if not field:
            field, number = str(number), number + 1
        value = args[int(field)] if field.isdigit() else kwargs[field]
        if not _SPECIFICATION.fullmatch(specification or ""):
            raise LimitExceeded(
                f"a format in a template does not support {specification!r:.40}; use a width of up to three digits"
            )
        if conversion not in (None, "s"):
            raise LimitExceeded(f"a format in a template does not support the conversion {conversion!r:.10}")
        if conversion == "s" or type(value) not in (str, int, float):
            value = machine.to_text(value)
        parts.append(machine.charge_result(format(value, specification or "")))
    return machine.join("", parts)


def _search_method(name: str) -> Callable[..., object]:
    def run(machine: Machine, items: list[object], value: object, *bounds: object) -> object:
        # The error for a missing value contains the value.
        machine.require_room(10 * machine.measure(value).characters)
        machine.measure(items)
        return getattr(items, name)(value, *bounds)

    return run


def _get(machine: Machine, mapping: dict[object, object], key: object, default: object = None, /) -> object:
    return mapping.get(machine.charge_key(key), default)


def _view_method(name: str) -> Callable[..., object]:
    return lambda machine, mapping: getattr(mapping, name)()


def _cycle(machine: Machine, loop: LoopContext, *args: object) -> object:
    return loop.cycle(*args)


def _changed(machine: Machine, loop: LoopContext, *value: object) -> object:
    for part in value:
        machine.charge_operand(part)
    return loop.changed(*value)


# -- functions


class RaisedByTemplate(Exception):  # noqa: N818
    """Raised by `raise_exception(message)`."""


def _raise_exception(machine: Machine, message: object) -> object:
    raise RaisedByTemplate(machine.to_text(message))


def _strftime_now(machine: Machine, format: object) -> object:
    if not isinstance(format, str):
        raise TypeError(f"strftime() argument 1 must be str, not {type(format).__name__}")
    if len(format) > MAX_CHARACTERS or not _DATE.fullmatch(format):
        raise LimitExceeded(f"a date format has up to {MAX_CHARACTERS} characters, and directives without widths")
    return datetime.now().strftime(format)


def _joiner(machine: Machine, sep: object = ", ") -> object:
    used: list[bool] = []

    def run(machine: Machine) -> object:
        if used:
            return sep
        used.append(True)
        return ""

    machine.charge_bytes(512)
    return Function(run, "joiner")


def _range(machine: Machine, *bounds: object) -> object:
    return safe_range(*cast("tuple[int, ...]", bounds))


def _make_dict(machine: Machine, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[object, object]:
    if len(args) > 1:
        raise TypeError(f"dict expected at most 1 argument, got {len(args)}")
    pairs: dict[object, object] = {}
    for source in (*args, kwargs):
        items = source.items() if isinstance(source, dict) else source
        for index, item in enumerate(machine.to_list(items)):
            pair = machine.to_list(item)
            if len(pair) != 2:
                raise ValueError(
                    f"dictionary update sequence element #{index} has length {len(pair)}; 2 is required"
                )
            machine.charge_bytes(128)
            pairs[machine.charge_key(pair[0])] = pair[1]
    return pairs


def _dict(machine: Machine, /, *args: object, **kwargs: object) -> object:
    return _make_dict(machine, args, kwargs)


def _namespace(machine: Machine, /, *args: object, **kwargs: object) -> object:
    machine.charge_bytes(512)
    return Namespace(cast("dict[str, object]", _make_dict(machine, args, kwargs)))


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
    **{name: _transform_method(name) for name in ["capitalize", "casefold", "lower", "swapcase", "title", "upper"]},
    **{name: _transform_method(name) for name in ["partition", "removeprefix", "removesuffix", "rpartition"]},
    **{
        name: _inspect_method(name)
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
    **{name: _strip_method(name) for name in ("lstrip", "rstrip", "strip")},
    **{name: _split_method(name) for name in ("rsplit", "split")},
    **{name: _pad_method(name) for name in ("center", "ljust", "rjust", "zfill")},
    "format": _str_format,
    "join": _str_join,
    "replace": _str_replace,
    "splitlines": _splitlines,
}
METHODS: Final[dict[type, dict[str, Callable[..., object]]]] = {
    str: _TEXT_METHODS,
    Markup: _TEXT_METHODS,
    list: {"count": _search_method("count"), "index": _search_method("index")},
    tuple: {"count": _search_method("count"), "index": _search_method("index")},
    dict: {
        "get": _get,
        "items": _view_method("items"),
        "keys": _view_method("keys"),
        "values": _view_method("values"),
    },
    LoopContext: {"changed": _changed, "cycle": _cycle},
}
