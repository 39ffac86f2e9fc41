"""What a chat template runs on: its budget, its operators, and the little that it may reach.

A chat template is a program out of a downloaded file. Its compiled code (of
`template_code`) does nothing by itself but call a `Machine`, one for each
rendering: every attribute, call, operator, loop and text goes through it, is
held against lists of what may be, and is paid for out of one budget before it
is done. Values are plain data, rebuilt by the caller; a template sees nothing
else. `templates` makes the machines; `template_filters` has what they know.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sized
from time import thread_time
from types import GeneratorType, MethodType
from typing import Final, cast

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from markupsafe import Markup

from erllama.chat.templates.limits import (
    MAX_CALLS,
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_INT_BITS,
    MAX_ITEMS,
    MAX_MEMORY,
    MAX_SECONDS,
    MAX_STEPS,
    MAX_TEXT,
    MEMORY_PER_CHARACTER,
    SCALARS,
    TEXTS,
    Function,
    LimitExceeded,
    Method,
    Namespace,
    Tables,
    Weight,
    described,
)

# Steps between two looks at the clock.
_SLICE: Final = 1000
# What a call, a namespace and a macro take, in steps and in bytes.
_CALL_STEPS: Final = 4
_OBJECT_BYTES: Final = 512
# Characters that are copied, searched or compared for a step.
_STEP_SHIFT: Final = 6

_VIEWS: Final = frozenset({type({}.keys()), type({}.values()), type({}.items())})
_SEQUENCES: Final = frozenset({list, tuple, range}) | _VIEWS
_ITERABLE: Final = TEXTS | _SEQUENCES | {dict, GeneratorType}
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


class _Bound(dict[str, Callable[..., object]]):
    """Functions of a table, each made the machine's own when it is first asked for."""

    def __init__(self, machine: Machine, table: Mapping[str, Callable[..., object]]) -> None:
        self._machine, self._table = machine, table

    def __missing__(self, name: str) -> Callable[..., object]:
        bound = self[name] = MethodType(self._table[name], self._machine)
        return bound


class Steps:
    """An iterable whose iteration is paid for."""

    __slots__ = ("_bytes", "_iterable", "_machine", "_steps")

    def __init__(self, machine: Machine, iterable: object, steps: int, size: int) -> None:
        self._machine, self._iterable, self._steps, self._bytes = machine, iterable, steps, size

    def __len__(self) -> int:
        return len(cast(Sized, self._iterable))

    def __iter__(self) -> Iterator[object]:
        machine, steps, size = self._machine, self._steps, self._bytes
        for item in self._iterable:  # type: ignore[attr-defined]
            machine.tick(steps)
            machine.spend(size)
            yield item


class Machine:
    """Everything the code of one rendering may do, and the budget it does it from.

    To the generated code it stands where jinja2's environment would. It is of one
    rendering and one thread; nothing of it is shared but the tables it reads.
    """

    undefined = Undefined
    is_async = False
    autoescape = False

    def __init__(self, tables: Tables, given: int = 0) -> None:
        """`given`: characters of what is rendered."""
        self._left = _SLICE
        self._steps = MAX_STEPS
        self._memory = MAX_MEMORY + MEMORY_PER_CHARACTER * given
        self._deadline = thread_time() + MAX_SECONDS
        self._calls = 0
        self.filters = _Bound(self, tables.filters)
        self.tests = _Bound(self, tables.tests)
        self.generation = tables.generation
        self._methods = tables.methods

    # -- budget

    def tick(self, steps: int = 1) -> None:
        """Pay for steps."""
        self._left -= steps
        if self._left < 0:
            self._steps -= _SLICE - self._left
            self._left = _SLICE
            if self._steps < 0:
                raise LimitExceeded(f"the template does more than {MAX_STEPS:,} steps")
            if thread_time() > self._deadline:
                raise LimitExceeded(f"the template runs for more than {MAX_SECONDS:g} s")

    def spend(self, size: int) -> None:
        """Pay for bytes, before they are taken."""
        self._memory -= size
        if self._memory < 0:
            raise LimitExceeded(f"the template makes more than {MAX_MEMORY >> 20} MiB")

    def room(self, length: int, wide: bool = True) -> None:
        """Pay for a text of so many characters, before it is made."""
        if length > MAX_TEXT:
            raise LimitExceeded(f"the template makes a text of {length:,} characters; at most {MAX_TEXT:,} may be")
        self.spend(length << 2 if wide else length)
        self.tick(1 + (length >> _STEP_SHIFT))

    def made(self, text: str) -> str:
        """Pay for a text that is no longer than a few others that were paid for."""
        self.room(len(text), not text.isascii())
        return text

    def might_take(self, length: int) -> None:
        """Refuse to make a text of so many characters, if at worst there is no room for it."""
        if length > self._memory:
            raise LimitExceeded(f"the template might make a text of {length:,} characters")

    def weigh(self, value: object, *, data: bool = False) -> Weight:
        """Pay for a walk over all that a value holds.

        With `data`, what is neither data nor undefined is a TypeError.
        """
        weight, level, total = 0, [value], 1
        for depth in range(MAX_DEPTH):
            below: list[object] = []
            for item in level:
                kind = type(item)
                if kind in TEXTS:
                    weight += len(cast(str, item)) + 4
                elif kind is int:
                    weight += 4 + cast(int, item).bit_length() // 3
                elif kind is dict or kind in _SEQUENCES:
                    size = len(cast(Sized, item)) * (2 if kind is dict else 1)
                    total += size
                    if total > MAX_ITEMS:
                        raise LimitExceeded(f"the template handles a value of more than {MAX_ITEMS:,} parts")
                    weight += 2 + 2 * size
                    below.extend(cast("list[object]", item))
                    if kind is dict:
                        below.extend(cast("dict[str, object]", item).values())
                elif data and kind not in SCALARS and not isinstance(item, Undefined):
                    raise TypeError(f"{described(item)} is no data")
                else:
                    weight += 24
            self.tick(len(level))
            if not below:
                self.tick(weight >> _STEP_SHIFT)
                return Weight(weight, total, depth)
            level = below
        raise LimitExceeded(f"the template nests values deeper than {MAX_DEPTH}")

    # -- hooks that `template_code` writes into a template

    def operand(self, value: object) -> object:
        """A value about to be compared: paid for by what the comparison may walk over."""
        kind = type(value)
        if kind in TEXTS:
            self.tick(1 + (len(cast(str, value)) >> _STEP_SHIFT))
        elif kind not in SCALARS:
            self.weigh(value)
        return value

    def container(self, value: object) -> object:
        """A value about to be searched with `in`."""
        if type(value) is GeneratorType:
            return (self.operand(item) for item in value)
        return value if type(value) is dict else self.operand(value)

    def key(self, value: object) -> object:
        """A value about to be hashed."""
        kind = type(value)
        if kind is tuple:
            self.weigh(value)
        elif kind not in SCALARS and kind not in TEXTS and kind is not Undefined:
            raise TypeError(f"unhashable type: {kind.__name__!r}")
        return value

    def built(self, value: object) -> object:
        """A list, tuple or dict that was written out."""
        self.spend(64 + 16 * len(cast(Sized, value)))
        self.tick()
        return value

    def each(self, iterable: object, steps: int = 16, size: int = 64) -> object:
        """What a loop goes over, each iteration at a price."""
        self._iterable(iterable)
        return Steps(self, iterable, steps, size)

    def slice(self, value: object, start: object, stop: object, step: object) -> object:
        """`value[start:stop:step]`."""
        if type(value) in TEXTS:
            self.room(len(cast(str, value)))
        elif type(value) in (list, tuple):
            self.spend(8 * len(cast(Sized, value)))
            self.tick(1 + (len(cast(Sized, value)) >> 3))
        elif type(value) is not range and not isinstance(value, Undefined):
            raise TypeError(f"{described(value)} cannot be sliced")
        return value[start:stop:step]  # type: ignore[index]

    # -- what generated code calls

    def getattr(self, value: object, name: str) -> object:
        """`value.name`."""
        self.tick()
        if type(value) is dict and name not in _DICT_NAMES:
            try:
                return value[name]
            except KeyError:
                return Undefined(obj=value, name=name)
        return self._attribute(value, name)

    def getitem(self, value: object, key: object) -> object:
        """`value[key]`."""
        self.tick()
        kind, key_kind = type(value), type(key)
        if kind is dict and key_kind is str and key in cast("dict[object, object]", value):
            return cast("dict[object, object]", value)[key]
        if isinstance(value, Undefined):
            return value[key]  # raises
        if key_kind in TEXTS or key_kind in SCALARS or key_kind is tuple:
            if key_kind is tuple:
                self.weigh(key)
            if kind is dict or kind in TEXTS or kind in (list, tuple, range):
                try:
                    return cast("dict[object, object]", value)[key]
                except (LookupError, TypeError):
                    pass
            if key_kind in TEXTS:
                # Of a longer name, what an error would tell is enough.
                return self._attribute(value, str(key)[: 4 * MAX_CHARACTERS])
            return Undefined(obj=value, name=cast(str, key))
        return Undefined(obj=value, name=described(key))

    def call(self, context: object, function: object, /, *args: object, **kwargs: object) -> object:
        """`function(*args, **kwargs)`, for the few things that may be called."""
        self.tick(_CALL_STEPS + len(args) + len(kwargs))
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
        """`left symbol right`."""
        if symbol == "+" and type(left) is str and type(right) is str:
            self.room(len(left) + len(right), not (left.isascii() and right.isascii()))
            return left + right
        self.tick()
        for side in (left, right):
            if type(side) not in _OPERANDS and not isinstance(side, Undefined):
                raise TypeError(f"unsupported operand for {symbol}: {described(side)}")
        before, function = _BINARY[symbol]
        before(self, left, right)
        return _number(function(left, right))

    def call_unop(self, context: object, symbol: str, value: object) -> object:
        """`-value` or `+value`."""
        self.tick()
        number = cast(int, value)
        return -number if symbol == "-" else +number

    def text(self, value: object) -> str:
        """What `{{ value }}` writes."""
        kind = type(value)
        if kind is str:
            return cast(str, value)
        if kind in SCALARS or kind is Markup:
            return str(value)
        if isinstance(value, Undefined):
            return ""
        if kind not in _SEQUENCES and kind is not dict:
            raise TypeError(f"{described(value)} is no text")
        # A character that cannot be printed takes ten.
        self.might_take(10 * self.weigh(value, data=True).text)
        return self.made(str(value))

    def soft_text(self, value: object) -> str:
        """As `text`, and what is marked safe stays so."""
        return value if isinstance(value, str) else self.text(value)

    def concat(self, parts: list[str]) -> str:
        """What a macro or a block wrote."""
        self.room(sum(map(len, parts)), wide=False)
        return "".join(parts)

    def concatenate(self, values: tuple[object, ...]) -> str:
        """`a ~ b ~ c`."""
        parts = [self.text(value) for value in values]
        self.room(sum(map(len, parts)))
        return "".join(parts)

    def loop(self, iterable: object, undefined: type[Undefined], *rest: object) -> LoopContext:
        """The `loop` of a loop that reads it."""
        self.spend(_OBJECT_BYTES)
        counted = iterable if isinstance(iterable, Steps) else self.each(iterable)
        return LoopContext(counted, undefined, *rest)  # type: ignore[arg-type]

    def macro(self, environment: object, function: Callable[..., str], *rest: object) -> Macro:
        """A macro, at its definition."""
        self.spend(_OBJECT_BYTES)
        return Macro(cast(None, self), function, *rest)  # type: ignore[arg-type]

    # -- for filters and methods

    def drawn(self, iterable: object) -> list[object]:
        """All of an iterable, as a list."""
        self._iterable(iterable)
        if not isinstance(iterable, GeneratorType):
            size = len(cast(Sized, iterable))
            self.spend(64 * size if type(iterable) in TEXTS else 8 * size)
            self.tick(1 + size)
            return list(cast("list[object]", iterable))
        items = []
        for item in iterable:
            self.tick()
            self.spend(16)
            items.append(item)
        return items

    def joined(self, separator: str, parts: list[str]) -> str:
        """`separator.join(parts)`; if it is marked safe, parts are escaped, at five characters for one."""
        length = sum(map(len, parts)) + len(separator) * len(parts)
        self.room(length * 5 if type(separator) is Markup else length)
        return separator.join(parts)

    def percent(self, text: str, values: object) -> None:
        """Pay for `text % values`."""
        if type(text) is Markup:
            raise TypeError("what is marked safe takes no %")
        self.tick(1 + (len(text) >> _STEP_SHIFT))
        conversions = 0
        for conversions, match in enumerate(_CONVERSION.finditer(text), start=1):
            if (
                conversions > MAX_CHARACTERS
                or max(int(digits or 0) for digits in match.groups()[:2]) > MAX_CHARACTERS
            ):
                raise LimitExceeded(f"the template formats more than {MAX_CHARACTERS} values, or digits of one")
        if "%" in _CONVERSION.sub("", text):
            raise TypeError("templates have the conversions of %s, %d and their like, with their width in digits")
        weight = self.weigh(values, data=True).text
        self.might_take(conversions * (MAX_CHARACTERS * 2 + 10 * weight))
        self.room(len(text))

    def _iterable(self, value: object) -> None:
        if type(value) not in _ITERABLE and not isinstance(value, Undefined):
            raise TypeError(f"{type(value).__name__!r} object is not iterable")

    def _attribute(self, value: object, name: str) -> object:
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


def _number(value: object) -> object:
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise LimitExceeded(f"the template makes an integer of more than {MAX_INT_BITS} bits")
    elif isinstance(value, complex):
        raise TypeError("a complex number is no value of a template")
    return value


def _before_add(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, str) and isinstance(right, str):
        length = len(left) + len(right)
        # What is marked safe escapes what is added to it, at five characters for one.
        machine.room(
            length if type(left) is type(right) is str else 5 * length, not (left.isascii() and right.isascii())
        )
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        machine.spend(8 * (len(left) + len(right)))
        machine.tick((len(left) + len(right)) >> 3)


def _before_multiply(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _bits(left.bit_length() + right.bit_length())
    for repeated, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(repeated, str | list | tuple):
            size = len(repeated) * max(times, 0)
            machine.room(size if isinstance(repeated, str) else 2 * size)


def _before_power(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _bits(left.bit_length() * max(right, 0))


def _before_modulo(machine: Machine, left: object, right: object) -> None:
    if isinstance(left, str):
        machine.percent(left, right)


def _bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise LimitExceeded(f"the template makes an integer of more than {MAX_INT_BITS} bits")


def _nothing(machine: Machine, left: object, right: object) -> None:
    pass


_BINARY: Final[
    Mapping[str, tuple[Callable[[Machine, object, object], None], Callable[[object, object], object]]]
] = {
    "+": (_before_add, operator.add),
    "-": (_nothing, operator.sub),
    "*": (_before_multiply, operator.mul),
    "/": (_nothing, operator.truediv),
    "//": (_nothing, operator.floordiv),
    "%": (_before_modulo, operator.mod),
    "**": (_before_power, operator.pow),
}
