"""The machine that runs a chat template: attributes, calls, operators and loops, all charged.

A chat template is a program from a downloaded file. Its compiled code (see `compiler`) only calls a `Machine`, one
for each rendering. The machine compares every attribute, call, operator, loop and text with lists of what is
allowed, and charges it to one budget before it runs it. All values are plain data, copied from the caller's.
`ChatTemplate.render` makes the machines.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sized
from types import GeneratorType, MethodType
from typing import Final, cast

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from markupsafe import Markup

from erllama.chat.templates.budget import STEP_SHIFT, Budget
from erllama.chat.templates.limits import MAX_CALLS, MAX_CHARACTERS, MAX_INT_BITS, LimitExceeded
from erllama.chat.templates.values import (
    SCALARS,
    SEQUENCES,
    TEXTS,
    Function,
    Method,
    Namespace,
    Tables,
    describe,
)

# Steps of a call, and bytes of a loop or a macro.
_CALL_STEPS: Final = 4
_OBJECT_BYTES: Final = 512

_ITERABLE: Final = TEXTS | SEQUENCES | {dict, GeneratorType}
_OPERANDS: Final = TEXTS | SCALARS | {list, tuple, dict}
_DICT_NAMES: Final = frozenset(dir(dict))
_LOOP_NAMES: Final = frozenset(
    [
        "depth",
        "depth0",
        "first",
        "index",
        "index0",
        "last",
        "length",
        "nextitem",
        "previtem",
        "revindex",
        "revindex0",
    ]
)
# A conversion of `%`, without the `*` that takes its width from an argument.
_CONVERSION = re.compile(r"%(?:\(\w*\))?[-+ #0]*(\d{0,3})(?:\.(\d{0,3}))?([sdirfFeEgGxXoc%])")


class _BoundTable(dict[str, Callable[..., object]]):
    """The functions of a table, each bound to the machine on first use."""

    def __init__(self, machine: Machine, table: Mapping[str, Callable[..., object]]) -> None:
        self._machine, self._table = machine, table

    def __missing__(self, name: str) -> Callable[..., object]:
        bound = self[name] = MethodType(self._table[name], self._machine)
        return bound


class ChargedIterable:
    """An iterable that charges the machine for each item."""

    __slots__ = ("_bytes", "_iterable", "_machine", "_steps")

    def __init__(self, machine: Machine, iterable: object, steps: int, size: int) -> None:
        self._machine, self._iterable, self._steps, self._bytes = machine, iterable, steps, size

    def __len__(self) -> int:
        return len(cast(Sized, self._iterable))

    def __iter__(self) -> Iterator[object]:
        machine, steps, size = self._machine, self._steps, self._bytes
        for item in self._iterable:  # type: ignore[attr-defined]
            machine.charge_steps(steps)
            machine.charge_bytes(size)
            yield item


class Machine(Budget):
    """Runs the operations of one rendering, and charges them to its budget.

    The generated code uses it in place of jinja2's environment. It belongs to one rendering and one thread. Only
    the tables are shared.

    Args:
        input_characters: number of characters of the input.
    """

    undefined = Undefined
    is_async = False
    autoescape = False

    def __init__(self, tables: Tables, input_characters: int = 0) -> None:
        super().__init__(input_characters)
        self._calls = 0
        self.filters = _BoundTable(self, tables.filters)
        self.tests = _BoundTable(self, tables.tests)
        self.generation = tables.generation
        self._methods = tables.methods

    # -- hooks that `compiler` writes into a template

    def charge_operand(self, value: object) -> object:
        """Charge a comparison by the values that it may walk over, and return the value."""
        kind = type(value)
        if kind in TEXTS:
            self.charge_steps(1 + (len(cast(str, value)) >> STEP_SHIFT))
        elif kind not in SCALARS:
            self.measure(value)
        return value

    def charge_container(self, value: object) -> object:
        """Charge a search with `in`, and return the value to search."""
        if type(value) is GeneratorType:
            return (self.charge_operand(item) for item in value)
        return value if type(value) is dict else self.charge_operand(value)

    def charge_key(self, value: object) -> object:
        """Charge hashing a value, and return the value."""
        kind = type(value)
        if kind is tuple:
            self.measure(value)
        elif kind not in SCALARS and kind not in TEXTS and kind is not Undefined:
            raise TypeError(f"unhashable type: {kind.__name__!r}")
        return value

    def charge_literal(self, value: object) -> object:
        """Charge a list, tuple or dict that the template writes out, and return it."""
        self.charge_bytes(64 + 16 * len(cast(Sized, value)))
        self.charge_steps()
        return value

    def charge_loop(self, iterable: object, steps: int = 16, size: int = 64) -> object:
        """Return an iterable that charges each iteration of a loop."""
        self._check_iterable(iterable)
        return ChargedIterable(self, iterable, steps, size)

    def slice(self, value: object, start: object, stop: object, step: object) -> object:
        """Return `value[start:stop:step]`."""
        if type(value) in TEXTS:
            self.charge_text(len(cast(str, value)))
        elif type(value) in (list, tuple):
            self.charge_bytes(8 * len(cast(Sized, value)))
            self.charge_steps(1 + (len(cast(Sized, value)) >> 3))
        elif type(value) is not range and not isinstance(value, Undefined):
            raise TypeError(f"{describe(value)} cannot be sliced")
        return value[start:stop:step]  # type: ignore[index]

    # -- operations that generated code calls

    def getattr(self, value: object, name: str) -> object:
        """Return `value.name`."""
        self.charge_steps()
        if type(value) is dict and name not in _DICT_NAMES:
            try:
                return value[name]
            except KeyError:
                return Undefined(obj=value, name=name)
        return self._get_attribute(value, name)

    def getitem(self, value: object, key: object) -> object:
        """Return `value[key]`."""
        self.charge_steps()
        kind, key_kind = type(value), type(key)
        if kind is dict and key_kind is str and key in cast("dict[object, object]", value):
            return cast("dict[object, object]", value)[key]
        if isinstance(value, Undefined):
            return value[key]  # raises
        if key_kind in TEXTS or key_kind in SCALARS or key_kind is tuple:
            if key_kind is tuple:
                self.measure(key)
            if kind is dict or kind in TEXTS or kind in (list, tuple, range):
                try:
                    return cast("dict[object, object]", value)[key]
                except (LookupError, TypeError):
                    pass
            if key_kind in TEXTS:
                # The beginning of a longer name is enough for an error message.
                return self._get_attribute(value, str(key)[: 4 * MAX_CHARACTERS])
            return Undefined(obj=value, name=cast(str, key))
        return Undefined(obj=value, name=describe(key))

    def call(self, context: object, function: object, /, *args: object, **kwargs: object) -> object:
        """Return `function(*args, **kwargs)`, for the few kinds of value that may be called."""
        self.charge_steps(_CALL_STEPS + len(args) + len(kwargs))
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        if isinstance(function, Method):
            return function.run(self, function.owner, *args, **kwargs)
        if isinstance(function, Function):
            return function.run(self, *args, **kwargs)
        if isinstance(function, Undefined):
            return function(*args, **kwargs)  # raises
        if not isinstance(function, Macro | LoopContext):
            raise TypeError(f"{type(function).__name__!r} object is not callable")
        if self._calls == MAX_CALLS:
            raise LimitExceeded(f"the template's macros call each other more than {MAX_CALLS} deep")
        self._calls += 1
        try:
            return function(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            self._calls -= 1

    def call_binop(self, context: object, symbol: str, left: object, right: object) -> object:
        """Return `left symbol right`."""
        if symbol == "+" and type(left) is str and type(right) is str:
            self.charge_text(len(left) + len(right), not (left.isascii() and right.isascii()))
            return left + right
        self.charge_steps()
        for side in (left, right):
            if type(side) not in _OPERANDS and not isinstance(side, Undefined):
                raise TypeError(f"unsupported operand for {symbol}: {describe(side)}")
        charge, function = _BINARY[symbol]
        charge(self, left, right)
        return _check_number(function(left, right))

    def call_unop(self, context: object, symbol: str, value: object) -> object:
        """Return `-value` or `+value`."""
        self.charge_steps()
        number = cast(int, value)
        return -number if symbol == "-" else +number

    def to_text(self, value: object) -> str:
        """Return the text that `{{ value }}` writes."""
        kind = type(value)
        if kind is str:
            return cast(str, value)
        if kind in SCALARS or kind is Markup:
            return str(value)
        if isinstance(value, Undefined):
            return ""
        if kind not in SEQUENCES and kind is not dict:
            raise TypeError(f"{describe(value)} cannot be written as text")
        # A character that is not printable is written as up to ten characters.
        self.require_room(10 * self.measure(value, data=True).characters)
        return self.charge_result(str(value))

    def to_soft_text(self, value: object) -> str:
        """Return the text of a value. Text that is marked safe stays marked."""
        return value if isinstance(value, str) else self.to_text(value)

    def concat(self, parts: list[str]) -> str:
        """Return the joined output of a macro or a block."""
        self.charge_text(sum(map(len, parts)), wide=False)
        return "".join(parts)

    def concatenate(self, values: tuple[object, ...]) -> str:
        """Return `a ~ b ~ c`."""
        parts = [self.to_text(value) for value in values]
        self.charge_text(sum(map(len, parts)))
        return "".join(parts)

    def make_loop(self, iterable: object, undefined: type[Undefined], *rest: object) -> LoopContext:
        """Return the `loop` variable of a loop that uses it."""
        self.charge_bytes(_OBJECT_BYTES)
        counted = iterable if isinstance(iterable, ChargedIterable) else self.charge_loop(iterable)
        return LoopContext(counted, undefined, *rest)  # type: ignore[arg-type]

    def make_macro(self, environment: object, function: Callable[..., str], *rest: object) -> Macro:
        """Return a macro, at its definition."""
        self.charge_bytes(_OBJECT_BYTES)
        return Macro(cast(None, self), function, *rest)  # type: ignore[arg-type]

    # -- for filters and methods

    def to_list(self, iterable: object) -> list[object]:
        """Return all items of an iterable as a list."""
        self._check_iterable(iterable)
        if not isinstance(iterable, GeneratorType):
            size = len(cast(Sized, iterable))
            self.charge_bytes(64 * size if type(iterable) in TEXTS else 8 * size)
            self.charge_steps(1 + size)
            return list(cast("list[object]", iterable))
        items = []
        for item in iterable:
            self.charge_steps()
            self.charge_bytes(16)
            items.append(item)
        return items

    def join(self, separator: str, parts: list[str]) -> str:
        """Return `separator.join(parts)`.

        A separator that is marked safe escapes the parts, which makes them up to five times longer.
        """
        length = sum(map(len, parts)) + len(separator) * len(parts)
        self.charge_text(length * 5 if type(separator) is Markup else length)
        return separator.join(parts)

    def charge_format(self, text: str, values: object) -> None:
        """Charge `text % values`."""
        if type(text) is Markup:
            raise TypeError("text that is marked safe does not support %")
        self.charge_steps(1 + (len(text) >> STEP_SHIFT))
        conversions = 0
        for conversions, match in enumerate(_CONVERSION.finditer(text), start=1):
            if (
                conversions > MAX_CHARACTERS
                or max(int(digits or 0) for digits in match.groups()[:2]) > MAX_CHARACTERS
            ):
                raise LimitExceeded(
                    f"the template formats more than {MAX_CHARACTERS} values, or one with more digits than that"
                )
        if "%" in _CONVERSION.sub("", text):
            raise TypeError(
                "a format in a template supports conversions such as %s and %d, with the width in digits"
            )
        characters = self.measure(values, data=True).characters
        self.require_room(conversions * (MAX_CHARACTERS * 2 + 10 * characters))
        self.charge_text(len(text))

    def _check_iterable(self, value: object) -> None:
        if type(value) not in _ITERABLE and not isinstance(value, Undefined):
            raise TypeError(f"{type(value).__name__!r} object is not iterable")

    def _get_attribute(self, value: object, name: str) -> object:
        kind = type(value)
        method = self._methods.get(kind, {}).get(name)
        if method is not None:
            return Method(method, value, name)
        if isinstance(value, Namespace):
            if name in value.attributes:
                return value.attributes[name]
        elif isinstance(value, Undefined):
            return value[name]  # raises
        elif isinstance(value, LoopContext) and name in _LOOP_NAMES:
            return getattr(value, name)
        elif hasattr(kind, name):
            message = f"access to attribute {name!r} of {kind.__name__!r} object is unsafe."
            return Undefined(message, obj=value, name=name, exc=SecurityError)
        return Undefined(obj=value, name=name)


def _check_number(value: object) -> object:
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise LimitExceeded(f"the template makes an integer of more than {MAX_INT_BITS} bits")
    elif isinstance(value, complex):
        raise TypeError("templates do not support complex numbers")
    return value


def _charge_add(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, str) and isinstance(right, str):
        length = len(left) + len(right)
        # Text that is marked safe escapes added text: one character becomes up to five.
        machine.charge_text(
            length if type(left) is type(right) is str else 5 * length, not (left.isascii() and right.isascii())
        )
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        machine.charge_bytes(8 * (len(left) + len(right)))
        machine.charge_steps((len(left) + len(right)) >> 3)


def _charge_multiply(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for repeated, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(repeated, str | list | tuple):
            size = len(repeated) * max(times, 0)
            machine.charge_text(size if isinstance(repeated, str) else 2 * size)


def _charge_power(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))


def _charge_modulo(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, str):
        machine.charge_format(left, right)


def _check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise LimitExceeded(f"the template makes an integer of more than {MAX_INT_BITS} bits")


def _skip_charge(machine: Machine, left: object, right: object) -> None:
    pass


_BINARY: Final[
    Mapping[str, tuple[Callable[[Machine, object, object], None], Callable[[object, object], object]]]
] = {
    "+": (_charge_add, operator.add),
    "-": (_skip_charge, operator.sub),
    "*": (_charge_multiply, operator.mul),
    "/": (_skip_charge, operator.truediv),
    "//": (_skip_charge, operator.floordiv),
    "%": (_charge_modulo, operator.mod),
    "**": (_charge_power, operator.pow),
}
