"""The tests of chat templates, as in `x is defined`.

Each returns what jinja2's test of the same name returns, and charges the machine first. `filters` puts them into
the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.tests import TESTS as JINJA_TESTS

from erllama.chat.templates.machine import Machine
from erllama.chat.templates.values import Function, Method


def _divisibleby(machine: Machine, value: object, num: object) -> bool:
    return _remainder(machine, value, num) == 0


def _even(machine: Machine, value: object) -> bool:
    return _remainder(machine, value, 2) == 0


def _odd(machine: Machine, value: object) -> bool:
    return _remainder(machine, value, 2) == 1


def _remainder(machine: Machine, value: object, divisor: object) -> object:
    if isinstance(value, str):
        raise TypeError("not all arguments converted during string formatting")
    return machine.call_binop(None, "%", value, divisor)


def _in(machine: Machine, value: object, seq: object) -> bool:
    return machine.charge_operand(value) in cast("list[object]", machine.charge_container(seq))


def _callable(machine: Machine, value: object) -> bool:
    return isinstance(value, Method | Function | Macro | LoopContext | Undefined)


def _is_lower(machine: Machine, value: object) -> bool:
    return machine.to_text(value).islower()


def _is_upper(machine: Machine, value: object) -> bool:
    return machine.to_text(value).isupper()


def _make_pure_test(name: str) -> Callable[..., object]:
    """Return a test of jinja2 that only inspects the type of a value."""
    test = cast(Callable[..., object], JINJA_TESTS[name])
    return lambda machine, value, *args, **kwargs: test(value, *args, **kwargs)


def _make_comparison_test(name: str) -> Callable[..., object]:
    compare = cast(Callable[..., object], JINJA_TESTS[name])
    return lambda machine, value, other: compare(machine.charge_operand(value), machine.charge_operand(other))


TESTS: Final[dict[str, Callable[..., object]]] = {
    **{
        name: _make_pure_test(name)
        for name in [
            "boolean",
            "defined",
            "false",
            "float",
            "integer",
            "iterable",
            "mapping",
            "none",
            "number",
            "sameas",
            "sequence",
            "string",
            "true",
            "undefined",
        ]
    },
    **{
        name: _make_comparison_test(name)
        for name in [
            "==",
            "eq",
            "equalto",
            "!=",
            "ne",
            ">",
            "gt",
            "greaterthan",
            ">=",
            "ge",
            "<",
            "lt",
            "lessthan",
            "<=",
            "le",
        ]
    },
    "callable": _callable,
    "divisibleby": _divisibleby,
    "even": _even,
    "in": _in,
    "lower": _is_lower,
    "odd": _odd,
    "upper": _is_upper,
}
