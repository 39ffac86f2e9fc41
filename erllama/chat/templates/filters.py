"""The filters of chat templates, and the tables of everything that a template can name.

Each filter returns what jinja2's filter of the same name returns, to the byte, and charges the machine first.
Filters that chat templates do not use, and those that could do harm, are left out: a template that names one fails.
`template` and `compiler` use the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from typing import Final, cast

import jinja2.exceptions
from jinja2.exceptions import FilterArgumentError
from jinja2.runtime import Undefined
from markupsafe import Markup

from erllama.chat.templates import sequence_filters, text_filters
from erllama.chat.templates.limits import MAX_CHARACTERS, LimitExceeded
from erllama.chat.templates.machine import Machine
from erllama.chat.templates.methods import GENERATION, METHODS, check_small
from erllama.chat.templates.tests import TESTS
from erllama.chat.templates.values import Tables

# Characters that int() and float() read. A longer number exceeds MAX_INT_BITS, or can be written shorter.
_MAX_DIGITS: Final = 1000


def _abs(machine: Machine, value: object) -> object:
    return abs(cast(int, value))


def _default(machine: Machine, value: object, default_value: object = "", boolean: object = False) -> object:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _float(machine: Machine, value: object, default: object = 0.0) -> object:
    try:
        return float(cast(str, _check_digits(value)))
    except (TypeError, ValueError):
        return default


def _int(machine: Machine, value: object, default: object = 0, base: object = 10) -> object:
    try:
        if isinstance(value, str):
            return int(cast(str, _check_digits(value)), cast(int, base))
        return int(cast(float, value))
    except (TypeError, ValueError):
        try:
            return int(float(cast(str, _check_digits(value))))
        except (TypeError, ValueError, OverflowError):
            return default


def _check_digits(value: object) -> object:
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise LimitExceeded(f"the template reads a number out of more than {_MAX_DIGITS} characters")
    return value


def _length(machine: Machine, value: object) -> object:
    return len(cast(Sized, value))


def _map(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _mapped(machine, machine.to_list(value) if value else [], args, kwargs)


def _mapped(
    machine: Machine, items: list[object], args: tuple[object, ...], kwargs: dict[str, object]
) -> Iterator[object]:
    # As in jinja2, wrong arguments raise when the first item is read.
    if not items:
        return
    if not args and "attribute" in kwargs:
        function = sequence_filters.make_getter(machine, kwargs.pop("attribute"), kwargs.pop("default", None))
        if kwargs:
            raise FilterArgumentError(f"Unexpected keyword argument {next(iter(kwargs))!r}")
    elif not args:
        raise FilterArgumentError("map requires a filter argument")
    else:
        if not isinstance(args[0], str) or args[0] not in FILTERS:
            raise jinja2.exceptions.TemplateRuntimeError(
                f"No filter named {sequence_filters.describe_name(args[0])} found."
            )
        named = machine.filters[args[0]]

        def function(item: object) -> object:
            return named(item, *args[1:], **kwargs)

    for item in items:
        machine.charge_steps()
        yield function(item)


def _round(machine: Machine, value: object, precision: object = 0, method: object = "common") -> object:
    if method not in ("common", "ceil", "floor"):
        raise FilterArgumentError("method must be common, ceil or floor")
    if not isinstance(value, int | float) or not isinstance(precision, int):
        raise TypeError(f"type {type(value).__name__} doesn't define __round__ method")
    digits, number = check_small(precision, "a precision", MAX_CHARACTERS), value
    if method == "common":
        return round(number, digits)
    return (math.ceil if method == "ceil" else math.floor)(number * 10**digits) / 10**digits


def _safe(machine: Machine, value: object) -> object:
    return Markup(machine.to_text(value))


FILTERS: Final[dict[str, Callable[..., object]]] = {
    "abs": _abs,
    "capitalize": text_filters.capitalize_filter,
    "count": _length,
    "d": _default,
    "default": _default,
    "dictsort": sequence_filters.dictsort_filter,
    "e": text_filters.escape_filter,
    "escape": text_filters.escape_filter,
    "first": sequence_filters.first_filter,
    "float": _float,
    "format": text_filters.format_filter,
    "indent": text_filters.indent_filter,
    "int": _int,
    "items": sequence_filters.items_filter,
    "join": sequence_filters.join_filter,
    "last": sequence_filters.last_filter,
    "length": _length,
    "list": sequence_filters.list_filter,
    "lower": text_filters.lower_filter,
    "map": _map,
    "max": sequence_filters.max_filter,
    "min": sequence_filters.min_filter,
    "reject": sequence_filters.reject_filter,
    "rejectattr": sequence_filters.rejectattr_filter,
    "replace": text_filters.replace_filter,
    "reverse": sequence_filters.reverse_filter,
    "round": _round,
    "safe": _safe,
    "select": sequence_filters.select_filter,
    "selectattr": sequence_filters.selectattr_filter,
    "sort": sequence_filters.sort_filter,
    "string": text_filters.string_filter,
    "sum": sequence_filters.sum_filter,
    "title": text_filters.title_filter,
    "tojson": text_filters.tojson_filter,
    "trim": text_filters.trim_filter,
    "truncate": text_filters.truncate_filter,
    "unique": sequence_filters.unique_filter,
    "upper": text_filters.upper_filter,
    "wordcount": text_filters.wordcount_filter,
}

HOOKS: Final[dict[str, Callable[..., object]]] = {
    "(literal)": Machine.charge_literal,
    "(container)": Machine.charge_container,
    "(loop)": Machine.charge_loop,
    "(key)": Machine.charge_key,
    "(operand)": Machine.charge_operand,
    "(slice)": Machine.slice,
}

TABLES: Final = Tables(FILTERS | HOOKS, TESTS, METHODS, GENERATION)
