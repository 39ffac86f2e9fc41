"""The filters of chat templates, and no others; with `template_tests`, all that they may call.

Each gives what jinja2's of that name gives, to the byte, and pays its machine
first. Those that no chat template has a use for, and those that could do harm,
are not here: a template that names one fails.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sized
from typing import Final, cast

import jinja2.exceptions
from jinja2.exceptions import FilterArgumentError
from jinja2.filters import do_indent, do_title
from jinja2.runtime import Undefined
from markupsafe import Markup, escape

from erllama.chat.templates.limits import MAX_CHARACTERS, LimitExceeded, Tables
from erllama.chat.templates.machine import Machine
from erllama.chat.templates.methods import (
    GENERATION,
    LINE_ENDS,
    METHODS,
    PART_BYTES,
    count_any,
    replaced,
    small,
)
from erllama.chat.templates.tests import TESTS

# Characters that int() and float() read: a number of more is beyond MAX_INT_BITS, or should be written shorter.
_MAX_DIGITS: Final = 1000

_WORD = re.compile(r"\w+")

# -- what several need


def _getter(machine: Machine, attribute: object, default: object = None) -> Callable[[object], object]:
    """What reads `attribute`, as "a.0.b", of an item."""
    parts: list[object]
    if attribute is None:
        parts = []
    elif isinstance(attribute, str):
        if len(attribute) > MAX_CHARACTERS:
            raise LimitExceeded(f"the template names an attribute of more than {MAX_CHARACTERS} characters")
        parts = [int(part) if part.isdigit() else part for part in attribute.split(".")]
    else:
        parts = [attribute]

    def get(item: object) -> object:
        for part in parts:
            item = machine.getitem(item, part)
            if default is not None and isinstance(item, Undefined):
                item = default
        return item

    return get


def _sorting_key(machine: Machine, attributes: list[object], case_sensitive: object) -> Callable[[object], object]:
    """What items are compared by: an attribute, or several of them; texts in lower case."""
    getters = [_getter(machine, name) for name in attributes]

    def part(item: object, get: Callable[[object], object]) -> object:
        value = machine.operand(get(item))
        return machine.made(value.lower()) if isinstance(value, str) and not case_sensitive else value

    if len(getters) == 1:
        return lambda item: part(item, getters[0])
    return lambda item: [part(item, get) for get in getters]


def _sorted(
    machine: Machine, items: list[object], key: Callable[[object], object], reverse: object
) -> list[object]:
    """Items in order; a comparison of two may walk over both."""
    keys = [key(item) for item in items]
    machine.tick((machine.weigh(keys).text + 8 * len(keys)) * len(keys).bit_length() >> 5)
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=bool(reverse))  # type: ignore[arg-type]
    return [items[index] for index in order]


def _judge(machine: Machine, arguments: tuple[object, ...], kwargs: dict[str, object]) -> Callable[[object], bool]:
    """The test that select() and its like name, or truth."""
    if not arguments:
        return bool
    if not isinstance(arguments[0], str) or arguments[0] not in TESTS:
        raise jinja2.exceptions.TemplateRuntimeError(f"No test named {_short(arguments[0])} found.")
    test = machine.tests[arguments[0]]
    return lambda item: bool(test(item, *arguments[1:], **kwargs))


def _short(value: object) -> str:
    return repr(value)[:80] if isinstance(value, str) and len(value) < MAX_CHARACTERS else type(value).__name__


# -- filters


def _abs(machine: Machine, value: object) -> object:
    return abs(cast(int, value))


def _capitalize(machine: Machine, value: object) -> object:
    return machine.made(machine.soft_text(value).capitalize())


def _default(machine: Machine, value: object, default_value: object = "", boolean: object = False) -> object:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _dictsort(
    machine: Machine, value: object, case_sensitive: object = False, by: object = "key", reverse: object = False
) -> object:
    if by not in ("key", "value"):
        raise FilterArgumentError('You can only sort by either "key" or "value"')
    if not isinstance(value, dict):
        raise TypeError("Can only get item pairs from a mapping.")
    items = machine.drawn(value.items())
    return _sorted(machine, items, _sorting_key(machine, [0 if by == "key" else 1], case_sensitive), reverse)


def _escape(machine: Machine, value: object) -> object:
    text = machine.soft_text(value)
    machine.room(5 * len(text), not text.isascii())
    return escape(text)


def _first(machine: Machine, value: object) -> object:
    for item in machine.each(value):  # type: ignore[attr-defined]
        return item
    return Undefined("No first item, sequence was empty.")


def _last(machine: Machine, value: object) -> object:
    for item in reversed(value):  # type: ignore[call-overload]
        return item
    return Undefined("No last item, sequence was empty.")


def _float(machine: Machine, value: object, default: object = 0.0) -> object:
    try:
        return float(cast(str, _digits(value)))
    except (TypeError, ValueError):
        return default


def _format(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return machine.call_binop(None, "%", machine.soft_text(value), kwargs or args)


def _indent(
    machine: Machine, value: object, width: object = 4, first: object = False, blank: object = False
) -> object:
    text = machine.soft_text(value)
    small(width, "an indent", MAX_CHARACTERS)
    if not isinstance(width, int | str):
        raise TypeError("width must be a number or a text")
    unit = len(width) if isinstance(width, str) else width
    machine.spend(PART_BYTES * (text.count("\n") + 1))
    machine.room(len(text) + unit * (count_any(text, LINE_ENDS) + 1))
    return do_indent(text, width, bool(first), bool(blank))


def _int(machine: Machine, value: object, default: object = 0, base: object = 10) -> object:
    try:
        if isinstance(value, str):
            return int(cast(str, _digits(value)), cast(int, base))
        return int(cast(float, value))
    except (TypeError, ValueError):
        try:
            return int(float(cast(str, _digits(value))))
        except (TypeError, ValueError, OverflowError):
            return default


def _digits(value: object) -> object:
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise LimitExceeded(f"the template reads a number out of more than {_MAX_DIGITS} characters")
    return value


def _items(machine: Machine, value: object) -> object:
    if isinstance(value, Undefined):
        return _lazily([])
    if not isinstance(value, dict):
        raise TypeError("Can only get item pairs from a mapping.")
    return _lazily(machine.drawn(value.items()))


def _lazily(items: list[object]) -> Iterator[object]:
    """What jinja2's lazy filters give: read once, of no length, true."""
    yield from items


def _join(machine: Machine, value: object, d: object = "", attribute: object = None) -> object:
    items = machine.drawn(value)
    if attribute is not None:
        get = _getter(machine, attribute)
        items = [get(item) for item in items]
    return machine.joined(machine.text(d), [machine.text(item) for item in items])


def _length(machine: Machine, value: object) -> object:
    return len(cast(Sized, value))


def _list(machine: Machine, value: object) -> object:
    return machine.drawn(value)


def _lower(machine: Machine, value: object) -> object:
    return machine.made(machine.soft_text(value).lower())


def _map(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _mapped(machine, machine.drawn(value) if value else [], args, kwargs)


def _mapped(
    machine: Machine, items: list[object], args: tuple[object, ...], kwargs: dict[str, object]
) -> Iterator[object]:
    # As in jinja2, what is wrong with the arguments is told when the first item is read.
    if not items:
        return
    if not args and "attribute" in kwargs:
        function = _getter(machine, kwargs.pop("attribute"), kwargs.pop("default", None))
        if kwargs:
            raise FilterArgumentError(f"Unexpected keyword argument {next(iter(kwargs))!r}")
    elif not args:
        raise FilterArgumentError("map requires a filter argument")
    else:
        if not isinstance(args[0], str) or args[0] not in FILTERS:
            raise jinja2.exceptions.TemplateRuntimeError(f"No filter named {_short(args[0])} found.")
        named = machine.filters[args[0]]

        def function(item: object) -> object:
            return named(item, *args[1:], **kwargs)

    for item in items:
        machine.tick()
        yield function(item)


def _maximum(machine: Machine, value: object, case_sensitive: object = False, attribute: object = None) -> object:
    return _extreme(machine, max, value, case_sensitive, attribute)


def _minimum(machine: Machine, value: object, case_sensitive: object = False, attribute: object = None) -> object:
    return _extreme(machine, min, value, case_sensitive, attribute)


def _extreme(
    machine: Machine, which: Callable[..., object], value: object, case_sensitive: object, attribute: object
) -> object:
    items = machine.drawn(value)
    if not items:
        return Undefined("No aggregated item, sequence was empty.")
    return which(items, key=_sorting_key(machine, [attribute], case_sensitive))


def _reject(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _chosen(machine, value, args, kwargs, wanted=False)


def _rejectattr(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _chosen(machine, value, args, kwargs, wanted=False, by_attribute=True)


def _select(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _chosen(machine, value, args, kwargs, wanted=True)


def _selectattr(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _chosen(machine, value, args, kwargs, wanted=True, by_attribute=True)


def _chosen(
    machine: Machine,
    value: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    wanted: bool,
    by_attribute: bool = False,
) -> Iterator[object]:
    # Read before the first item is asked for, so that lazy values never nest.
    items = machine.drawn(value) if value else []

    def chosen() -> Iterator[object]:
        if not items:
            return
        if by_attribute and not args:
            raise FilterArgumentError("Missing parameter for attribute name")
        get = _getter(machine, args[0] if by_attribute else None)
        judge = _judge(machine, args[1:] if by_attribute else args, kwargs)
        for item in items:
            machine.tick()
            if judge(get(item)) is wanted:
                yield item

    return chosen()


def _replace(machine: Machine, value: object, old: object, new: object, count: object = None) -> object:
    text, before, after = machine.text(value), machine.text(old), machine.text(new)
    return replaced(machine, text, before, after, -1 if count is None else count)


def _reverse(machine: Machine, value: object) -> object:
    if isinstance(value, str):
        return machine.slice(value, None, None, -1)
    return _lazily(machine.drawn(value)[::-1])


def _round(machine: Machine, value: object, precision: object = 0, method: object = "common") -> object:
    if method not in ("common", "ceil", "floor"):
        raise FilterArgumentError("method must be common, ceil or floor")
    if not isinstance(value, int | float) or not isinstance(precision, int):
        raise TypeError(f"type {type(value).__name__} doesn't define __round__ method")
    digits, number = small(precision, "a precision", MAX_CHARACTERS), value
    if method == "common":
        return round(number, digits)
    return (math.ceil if method == "ceil" else math.floor)(number * 10**digits) / 10**digits


def _safe(machine: Machine, value: object) -> object:
    return Markup(machine.text(value))


def _sort(
    machine: Machine,
    value: object,
    reverse: object = False,
    case_sensitive: object = False,
    attribute: object = None,
) -> object:
    names = attribute.split(",", MAX_CHARACTERS) if isinstance(attribute, str) else [attribute]
    return _sorted(machine, machine.drawn(value), _sorting_key(machine, list(names), case_sensitive), reverse)


def _string(machine: Machine, value: object) -> object:
    return machine.soft_text(value)


def _sum(machine: Machine, value: object, attribute: object = None, start: object = 0) -> object:
    get, total = _getter(machine, attribute), start
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings [use ''.join(seq) instead]")
    for item in machine.drawn(value):
        total = machine.call_binop(None, "+", total, get(item))
    return total


def _title(machine: Machine, value: object) -> object:
    text = machine.soft_text(value)
    machine.spend(PART_BYTES * len(text))
    return machine.made(do_title(text))


def _tojson(
    machine: Machine,
    value: object,
    ensure_ascii: object = False,
    indent: object = None,
    separators: object = None,
    sort_keys: object = False,
) -> object:
    if not isinstance(indent, int | str | None):
        raise TypeError("indent must be a number or a text")
    if not isinstance(separators, list | tuple | None) or not all(
        isinstance(text, str) for text in separators or ()
    ):
        raise TypeError("separators must be two texts")
    between = max((len(small(text, "a separator", MAX_CHARACTERS)) for text in separators or ()), default=2)
    small(indent, "an indent", MAX_CHARACTERS)
    unit = len(indent) if isinstance(indent, str) else indent or 0
    weight = machine.weigh(value)
    # A character that must be escaped takes six, and two of those where all but ASCII is.
    machine.might_take(12 * weight.text + weight.parts * (weight.depth * unit + between))
    written = json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=cast("tuple[str, str]", separators),
        sort_keys=bool(sort_keys),
    )
    return machine.made(written)


def _trim(machine: Machine, value: object, chars: object = None) -> object:
    text = machine.soft_text(value)
    machine.room(len(text), not text.isascii())
    small(chars, "a strip", MAX_CHARACTERS)
    return text.strip(cast(str, chars))


def _truncate(
    machine: Machine,
    value: object,
    length: object = 255,
    killwords: object = False,
    end: object = "...",
    leeway: object = None,
) -> object:
    text, mark, most = machine.soft_text(value), machine.text(end), cast(int, length)
    spare = 5 if leeway is None else cast(int, leeway)
    if most < len(mark) or spare < 0:
        raise FilterArgumentError(f"a text cannot be cut to {most} characters that end with {len(mark)} others")
    if len(text) <= most + spare:
        return text
    cut = text[: most - len(mark)]
    return machine.made((cut if killwords else cut.rsplit(" ", 1)[0]) + mark)


def _unique(machine: Machine, value: object, case_sensitive: object = False, attribute: object = None) -> object:
    key, items = _sorting_key(machine, [attribute], case_sensitive), machine.drawn(value)

    def unique() -> Iterator[object]:
        seen = set()
        for item in items:
            machine.tick()
            found = machine.key(key(item))
            if found not in seen:
                seen.add(found)
                yield item

    return unique()


def _wordcount(machine: Machine, value: object) -> object:
    text = machine.soft_text(value)
    machine.room(len(text), not text.isascii())
    return sum(1 for _ in _WORD.finditer(text))


def _upper(machine: Machine, value: object) -> object:
    return machine.made(machine.soft_text(value).upper())


FILTERS: Final[dict[str, Callable[..., object]]] = {
    "abs": _abs,
    "capitalize": _capitalize,
    "count": _length,
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "e": _escape,
    "escape": _escape,
    "first": _first,
    "float": _float,
    "format": _format,
    "indent": _indent,
    "int": _int,
    "items": _items,
    "join": _join,
    "last": _last,
    "length": _length,
    "list": _list,
    "lower": _lower,
    "map": _map,
    "max": _maximum,
    "min": _minimum,
    "reject": _reject,
    "rejectattr": _rejectattr,
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": _safe,
    "select": _select,
    "selectattr": _selectattr,
    "sort": _sort,
    "string": _string,
    "sum": _sum,
    "title": _title,
    "tojson": _tojson,
    "trim": _trim,
    "truncate": _truncate,
    "unique": _unique,
    "upper": _upper,
    "wordcount": _wordcount,
}

HOOKS: Final[dict[str, Callable[..., object]]] = {
    "(built)": Machine.built,
    "(container)": Machine.container,
    "(each)": Machine.each,
    "(key)": Machine.key,
    "(operand)": Machine.operand,
    "(slice)": Machine.slice,
}

TABLES: Final = Tables(FILTERS | HOOKS, TESTS, METHODS, GENERATION)
