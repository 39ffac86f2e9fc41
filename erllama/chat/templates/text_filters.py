"""Filters of chat templates that turn a value into text.

Each returns what jinja2's filter of the same name returns, to the byte, and charges the machine first. `filters`
lists them.
"""

from __future__ import annotations

import json
import re
from typing import cast

from jinja2.exceptions import FilterArgumentError
from jinja2.filters import do_indent, do_title
from markupsafe import escape

from erllama.chat.templates.limits import MAX_CHARACTERS
from erllama.chat.templates.machine import Machine
from erllama.chat.templates.methods import LINE_ENDS, PART_BYTES, check_small, count_any, replace_text

_WORD = re.compile(r"\w+")


def capitalize_filter(machine: Machine, value: object) -> object:
    return machine.charge_result(machine.to_soft_text(value).capitalize())


def escape_filter(machine: Machine, value: object) -> object:
    text = machine.to_soft_text(value)
    machine.charge_text(5 * len(text), not text.isascii())
    return escape(text)


def format_filter(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return machine.call_binop(None, "%", machine.to_soft_text(value), kwargs or args)


def indent_filter(
    machine: Machine, value: object, width: object = 4, first: object = False, blank: object = False
) -> object:
    text = machine.to_soft_text(value)
    check_small(width, "an indent", MAX_CHARACTERS)
    if not isinstance(width, int | str):
        raise TypeError("width must be a number or a text")
    unit = len(width) if isinstance(width, str) else width
    machine.charge_bytes(PART_BYTES * (text.count("\n") + 1))
    machine.charge_text(len(text) + unit * (count_any(text, LINE_ENDS) + 1))
    return do_indent(text, width, bool(first), bool(blank))


def lower_filter(machine: Machine, value: object) -> object:
    return machine.charge_result(machine.to_soft_text(value).lower())


def replace_filter(machine: Machine, value: object, old: object, new: object, count: object = None) -> object:
    text, before, after = machine.to_text(value), machine.to_text(old), machine.to_text(new)
    return replace_text(machine, text, before, after, -1 if count is None else count)


def string_filter(machine: Machine, value: object) -> object:
    return machine.to_soft_text(value)


def title_filter(machine: Machine, value: object) -> object:
    text = machine.to_soft_text(value)
    machine.charge_bytes(PART_BYTES * len(text))
    return machine.charge_result(do_title(text))


def trim_filter(machine: Machine, value: object, chars: object = None) -> object:
    text = machine.to_soft_text(value)
    machine.charge_text(len(text), not text.isascii())
    check_small(chars, "an argument of strip", MAX_CHARACTERS)
    return text.strip(cast(str, chars))


def truncate_filter(
    machine: Machine,
    value: object,
    length: object = 255,
    killwords: object = False,
    end: object = "...",
    leeway: object = None,
) -> object:
    text, mark, limit = machine.to_soft_text(value), machine.to_text(end), cast(int, length)
    spare = 5 if leeway is None else cast(int, leeway)
    if limit < len(mark) or spare < 0:
        raise FilterArgumentError(f"a text cannot be cut to {limit} characters that end with {len(mark)} others")
    if len(text) <= limit + spare:
        return text
    cut = text[: limit - len(mark)]
    return machine.charge_result((cut if killwords else cut.rsplit(" ", 1)[0]) + mark)


def upper_filter(machine: Machine, value: object) -> object:
    return machine.charge_result(machine.to_soft_text(value).upper())


def wordcount_filter(machine: Machine, value: object) -> object:
    text = machine.to_soft_text(value)
    machine.charge_text(len(text), not text.isascii())
    return sum(1 for _ in _WORD.finditer(text))


def tojson_filter(
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
    between = max((len(check_small(text, "a separator", MAX_CHARACTERS)) for text in separators or ()), default=2)
    check_small(indent, "an indent", MAX_CHARACTERS)
    unit = len(indent) if isinstance(indent, str) else indent or 0
    size = machine.measure(value)
    # An escaped character takes six characters, and a surrogate pair takes two escapes.
    machine.require_room(12 * size.characters + size.parts * (size.depth * unit + between))
    json_text = json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=cast("tuple[str, str]", separators),
        sort_keys=bool(sort_keys),
    )
    return machine.charge_result(json_text)
