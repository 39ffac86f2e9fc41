"""Whether the options of oneOf exclude each other, as far as types, constants and bounds show.

`engine.grammar.schemas.rules` calls this: its rules can say that one option or another holds, not that only
one does.
Each option is read once. Options with constants are found by these, so their number may be large.
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

# Pairs of options that are compared; about half a second's.
_MAX_PAIRS = 50_000
_NUMERIC = frozenset({"integer", "number"})

Parts = list[dict[str, object]]
# The parts of schemas without references and allOf; None where no value has them.
Flat = Callable[[Iterable[object]], Parts | None]


class _Option(NamedTuple):
    """What is known of one option.

    Attributes:
        types: the types of its values.
        constants: its values as text; None where they are not listed.
        lows: its lower bounds.
        highs: its upper bounds.
        required: the properties that its objects must have.
        listed: by property, the values of it as text, where they are listed.
    """

    types: frozenset[str]
    constants: frozenset[str] | None
    lows: list[Bound]
    highs: list[Bound]
    required: frozenset[str]
    listed: Mapping[str, frozenset[str]]


def check_apart(options: Sequence[object], flat: Flat) -> None:
    """Check that no value has two options.

    Args:
        options: the schemas of a oneOf.
        flat: the parts of schemas that a value must all have.

    Raises:
        NotSupported: two options may hold together, or there are too many to compare.
    """
    known = [parts for option in options if (parts := flat([option])) is not None]
    # Only a property that an option requires can keep it apart from another.
    required = {name for parts in known for part in parts for name in required_by(part)}
    read = [_option(parts, required, flat) for parts in known]
    n_compared = 0
    for type_ in sorted({type_ for option in read for type_ in option.types}):
        for one, other in _candidates([option for option in read if type_ in option.types], type_):
            n_compared += 1
            if n_compared > _MAX_PAIRS:
                raise NotSupported(
                    f"oneOf has {len(options)} options, of which more than {_MAX_PAIRS} pairs must be compared; "
                    "use fewer options, anyOf, or options with constants that differ"
                )
            if not _apart(one, other):
                raise NotSupported(
                    "oneOf whose options may hold together is not supported; use anyOf, "
                    "or give the options types or constants that differ"
                )


def _option(parts: Parts, names: set[str], flat: Flat) -> _Option:
    types, constants = types_of(parts), constants_of(parts)
    listed: dict[str, frozenset[str]] = {}
    schemas: dict[str, list[object]] = {}
    for part in parts:
        for name, schema in properties_of(part).items():
            if name in names:
                schemas.setdefault(name, []).append(schema)
    for name, found in schemas.items():
        inner = flat(found)
        values = frozenset[str]() if inner is None else constants_of(inner)
        if values is not None:
            listed[name] = values
    return _Option(
        types if constants is None else types & frozenset(map(_type_of, constants)),
        constants,
        [bound for part in parts for bound in bounds_of(part, *LOWER)],
        [bound for part in parts for bound in bounds_of(part, *UPPER)],
        frozenset(name for part in parts for name in required_by(part)),
        listed,
    )


def _type_of(text: str) -> str:
    """The type of a constant, as `constants_of` writes it: integers have no point and no exponent."""
    first = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
    return first.get(text[0]) or ("integer" if text.lstrip("-").isdecimal() else "number")


def _candidates(options: Sequence[_Option], type_: str) -> Iterator[tuple[_Option, _Option]]:
    """The pairs of options of one type, without those that constants keep apart."""
    # Values of other types have no properties.
    names = Counter[str]() if type_ != "object" else _discriminators(options)
    name = max(names, key=lambda name: names[name], default="")
    n_constant = sum(option.constants is not None for option in options)
    by_property = names[name] > n_constant
    seen: dict[str, list[_Option]] = {}
    others: list[_Option] = []
    before: list[_Option] = []
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


def _discriminators(options: Iterable[_Option]) -> Counter[str]:
    """The required properties of which the values are listed, and in how many options."""
    return Counter(name for option in options for name in option.listed if name in option.required)


def _apart(one: _Option, other: _Option) -> bool:
    """Whether no value has both."""
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
    # Of other types as well, a value may have both.
    return both == {"object"} and any(
        not one.listed[name] & other.listed[name]
        for name in one.required | other.required
        if name in one.listed and name in other.listed
    )
