"""Filters of chat templates over sequences and mappings: selection, order and aggregation.

Each returns what jinja2's filter of the same name returns, and charges the machine first. `filters` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jinja2.exceptions
from jinja2.exceptions import FilterArgumentError
from jinja2.runtime import Undefined

from erllama.chat.templates.limits import MAX_CHARACTERS, LimitExceeded
from erllama.chat.templates.machine import Machine
from erllama.chat.templates.tests import TESTS


def make_getter(machine: Machine, attribute: object, default: object = None) -> Callable[[object], object]:
    """Return a function that reads `attribute`, such as "a.0.b", of an item."""
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


def _make_sort_key(
    machine: Machine, attributes: list[object], case_sensitive: object
) -> Callable[[object], object]:
    """Return the function for the sort key of an item: one attribute or several, with texts in lower case."""
    getters = [make_getter(machine, name) for name in attributes]

    def part(item: object, get: Callable[[object], object]) -> object:
        value = machine.charge_operand(get(item))
        return machine.charge_result(value.lower()) if isinstance(value, str) and not case_sensitive else value

    if len(getters) == 1:
        return lambda item: part(item, getters[0])
    return lambda item: [part(item, get) for get in getters]


def _sort_items(
    machine: Machine, items: list[object], key: Callable[[object], object], reverse: object
) -> list[object]:
    """Return items in order. The charge covers comparisons, each of which may walk over two keys."""
    keys = [key(item) for item in items]
    machine.charge_steps((machine.measure(keys).characters + 8 * len(keys)) * len(keys).bit_length() >> 5)
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=bool(reverse))  # type: ignore[arg-type]
    return [items[index] for index in order]


def _make_predicate(
    machine: Machine, arguments: tuple[object, ...], kwargs: dict[str, object]
) -> Callable[[object], bool]:
    """Return the test that the arguments of a filter such as select() name; `bool` if they name no test."""
    if not arguments:
        return bool
    if not isinstance(arguments[0], str) or arguments[0] not in TESTS:
        raise jinja2.exceptions.TemplateRuntimeError(f"No test named {describe_name(arguments[0])} found.")
    test = machine.tests[arguments[0]]
    return lambda item: bool(test(item, *arguments[1:], **kwargs))


def describe_name(value: object) -> str:
    return repr(value)[:80] if isinstance(value, str) and len(value) < MAX_CHARACTERS else type(value).__name__


def dictsort_filter(
    machine: Machine, value: object, case_sensitive: object = False, by: object = "key", reverse: object = False
) -> object:
    if by not in ("key", "value"):
        raise FilterArgumentError('You can only sort by either "key" or "value"')
    if not isinstance(value, dict):
        raise TypeError("Can only get item pairs from a mapping.")
    items = machine.to_list(value.items())
    return _sort_items(machine, items, _make_sort_key(machine, [0 if by == "key" else 1], case_sensitive), reverse)


def first_filter(machine: Machine, value: object) -> object:
    for item in machine.charge_loop(value):  # type: ignore[attr-defined]
        return item
    return Undefined("No first item, sequence was empty.")


def last_filter(machine: Machine, value: object) -> object:
    for item in reversed(value):  # type: ignore[call-overload]
        return item
    return Undefined("No last item, sequence was empty.")


def items_filter(machine: Machine, value: object) -> object:
    if isinstance(value, Undefined):
        return _as_iterator([])
    if not isinstance(value, dict):
        raise TypeError("Can only get item pairs from a mapping.")
    return _as_iterator(machine.to_list(value.items()))


def _as_iterator(items: list[object]) -> Iterator[object]:
    """Return what jinja2's lazy filters return: an iterator, which is true and has no length."""
    yield from items


def join_filter(machine: Machine, value: object, d: object = "", attribute: object = None) -> object:
    items = machine.to_list(value)
    if attribute is not None:
        get = make_getter(machine, attribute)
        items = [get(item) for item in items]
    return machine.join(machine.to_text(d), [machine.to_text(item) for item in items])


def list_filter(machine: Machine, value: object) -> object:
    return machine.to_list(value)


def max_filter(machine: Machine, value: object, case_sensitive: object = False, attribute: object = None) -> object:
    return _find_extreme(machine, max, value, case_sensitive, attribute)


def min_filter(machine: Machine, value: object, case_sensitive: object = False, attribute: object = None) -> object:
    return _find_extreme(machine, min, value, case_sensitive, attribute)


def _find_extreme(
    machine: Machine, which: Callable[..., object], value: object, case_sensitive: object, attribute: object
) -> object:
    items = machine.to_list(value)
    if not items:
        return Undefined("No aggregated item, sequence was empty.")
    return which(items, key=_make_sort_key(machine, [attribute], case_sensitive))


def reject_filter(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _select_items(machine, value, args, kwargs, wanted=False)


def rejectattr_filter(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _select_items(machine, value, args, kwargs, wanted=False, by_attribute=True)


def select_filter(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _select_items(machine, value, args, kwargs, wanted=True)


def selectattr_filter(machine: Machine, value: object, *args: object, **kwargs: object) -> object:
    return _select_items(machine, value, args, kwargs, wanted=True, by_attribute=True)


def _select_items(
    machine: Machine,
    value: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    wanted: bool,
    by_attribute: bool = False,
) -> Iterator[object]:
    # Read eagerly, so that iterators never nest.
    items = machine.to_list(value) if value else []

    def selected() -> Iterator[object]:
        if not items:
            return
        if by_attribute and not args:
            raise FilterArgumentError("Missing parameter for attribute name")
        get = make_getter(machine, args[0] if by_attribute else None)
        predicate = _make_predicate(machine, args[1:] if by_attribute else args, kwargs)
        for item in items:
            machine.charge_steps()
            if predicate(get(item)) is wanted:
                yield item

    return selected()


def reverse_filter(machine: Machine, value: object) -> object:
    if isinstance(value, str):
        return machine.slice(value, None, None, -1)
    return _as_iterator(machine.to_list(value)[::-1])


def sort_filter(
    machine: Machine,
    value: object,
    reverse: object = False,
    case_sensitive: object = False,
    attribute: object = None,
) -> object:
    names = attribute.split(",", MAX_CHARACTERS) if isinstance(attribute, str) else [attribute]
    return _sort_items(
        machine, machine.to_list(value), _make_sort_key(machine, list(names), case_sensitive), reverse
    )


def sum_filter(machine: Machine, value: object, attribute: object = None, start: object = 0) -> object:
    get, total = make_getter(machine, attribute), start
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings [use ''.join(seq) instead]")
    for item in machine.to_list(value):
        total = machine.call_binop(None, "+", total, get(item))
    return total


def unique_filter(
    machine: Machine, value: object, case_sensitive: object = False, attribute: object = None
) -> object:
    key, items = _make_sort_key(machine, [attribute], case_sensitive), machine.to_list(value)

    def unique() -> Iterator[object]:
        seen = set()
        for item in items:
            machine.charge_steps()
            item_key = machine.charge_key(key(item))
            if item_key not in seen:
                seen.add(item_key)
                yield item

    return unique()
