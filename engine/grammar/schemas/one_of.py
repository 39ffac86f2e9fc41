"""The check that the options of a oneOf exclude each other, by types, constants and bounds.

`engine.grammar.schemas.rules` calls this, because its rules can express alternatives but not exclusion. It reads
each option once. An index by constants finds the options with constants, so there may be many of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from erllama.engine.grammar.schemas.keywords import (
    LOWER,
    UPPER,
    bounds_of,
    constants_of,
    properties_of,
    required_by,
    types_of,
)
from erllama.engine.grammar.schemas.number_patterns import Bound
from erllama.engine.grammar.unsupported import NotSupported

# Pairs of options that are compared: about half a second.
_MAX_PAIRS = 50_000
_NUMERIC = frozenset({"integer", "number"})

Parts = list[dict[str, object]]
# Expands allOf and references of schemas; None if no value matches them.
Flatten = Callable[[Iterable[object]], Parts | None]


class _OneOfOption(NamedTuple):
    """The known properties of one option.

    Attributes:
        types: the types of its values.
        constants: its values as JSON text; None if they are not listed.
        lows: its lower bounds.
        highs: its upper bounds.
        required: the properties that its objects must have.
        listed: by property, its values as JSON text, for properties whose values are listed.
    """

    types: frozenset[str]
    constants: frozenset[str] | None
    lows: list[Bound]
    highs: list[Bound]
    required: frozenset[str]
    listed: Mapping[str, frozenset[str]]


def check_exclusive(options: Sequence[object], flatten: Flatten) -> None:
    """Check that no value matches two options.

    Args:
        options: the schemas of a oneOf.
        flatten: expands allOf and references.

    Raises:
        NotSupported: a value may match two options, or there are too many options to compare.
    """
    expanded = [parts for option in options if (parts := flatten([option])) is not None]
    # Only a required property can distinguish an option from another one.
    required = {name for parts in expanded for part in parts for name in required_by(part)}
    options_read = [_read_option(parts, required, flatten) for parts in expanded]
    n_compared = 0
    for type_ in sorted({type_ for option in options_read for type_ in option.types}):
        for one, other in _candidates([option for option in options_read if type_ in option.types], type_):
            n_compared += 1
            if n_compared > _MAX_PAIRS:
                raise NotSupported(
                    f"oneOf has {len(options)} options, of which more than {_MAX_PAIRS} pairs must be compared; "
                    "use fewer options, anyOf, or options with constants that differ"
                )
            if not _exclusive(one, other):
                raise NotSupported(
                    "oneOf whose options may match together is not supported; use anyOf, "
                    "or options whose types or constants differ"
                )


def _read_option(parts: Parts, names: set[str], flatten: Flatten) -> _OneOfOption:
    types, constants = types_of(parts), constants_of(parts)
    listed: dict[str, frozenset[str]] = {}
    schemas: dict[str, list[object]] = {}
    for part in parts:
        for name, schema in properties_of(part).items():
            if name in names:
                schemas.setdefault(name, []).append(schema)
    for name, found in schemas.items():
        inner = flatten(found)
        values = frozenset[str]() if inner is None else constants_of(inner)
        if values is not None:
            listed[name] = values
    return _OneOfOption(
        types if constants is None else types & frozenset(map(_type_of, constants)),
        constants,
        [bound for part in parts for bound in bounds_of(part, *LOWER)],
        [bound for part in parts for bound in bounds_of(part, *UPPER)],
        frozenset(name for part in parts for name in required_by(part)),
        listed,
    )


def _type_of(text: str) -> str:
    """Return the type of a constant that `constants_of` wrote. Integers have no decimal point and no exponent."""
    first = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
    return first.get(text[0]) or ("integer" if text.lstrip("-").isdecimal() else "number")


def _candidates(options: Sequence[_OneOfOption], type_: str) -> Iterator[tuple[_OneOfOption, _OneOfOption]]:
    """Yield the pairs of options of one type that constants do not distinguish."""
    # Only objects have properties.
    names = Counter[str]() if type_ != "object" else _discriminators(options)
    name = max(names, key=lambda name: names[name], default="")
    n_constant = sum(option.constants is not None for option in options)
    by_property = names[name] > n_constant
    seen: dict[str, list[_OneOfOption]] = {}
    others: list[_OneOfOption] = []
    before: list[_OneOfOption] = []
    for option in options:
        found = option.constants
        if by_property:
            found = option.listed.get(name) if name in option.required else None
        if found is None:
            yield from ((one, option) for one in before)
            others.append(option)
        else:
            yield from ((one, option) for one in others)
            for value in found:
                yield from ((one, option) for one in seen.get(value, ()))
            for value in found:
                seen.setdefault(value, []).append(option)
        before.append(option)


def _discriminators(options: Iterable[_OneOfOption]) -> Counter[str]:
    """Return the required properties with listed values, counted over the options."""
    return Counter(name for option in options for name in option.listed if name in option.required)


def _exclusive(one: _OneOfOption, other: _OneOfOption) -> bool:
    """Return whether no value matches both options."""
    both = one.types & other.types
    if not both:
        return True
    if one.constants is not None and other.constants is not None:
        return not one.constants & other.constants
    if both <= _NUMERIC:
        return any(
            low.value > high.value or (low.value == high.value and (low.exclusive or high.exclusive))
            for low in (*one.lows, *other.lows)
            for high in (*one.highs, *other.highs)
        )
    # For the other types, a value may match both.
    return both == {"object"} and any(
        not one.listed[name] & other.listed[name]
        for name in one.required | other.required
        if name in one.listed and name in other.listed
    )
