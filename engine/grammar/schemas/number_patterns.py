"""Regular expressions of the JSON numbers between two bounds, exact to the last digit.

Bounds are decimal numbers of any size, never doubles. `engine.grammar.schemas.rules` calls this for the numbers
that llguidance would round, since it computes with doubles.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, lcm
from typing import NamedTuple

from erllama.engine.grammar.unsupported import NotSupported

# Digits of a bound. Its pattern grows with their square: 400 digits take 80,000 characters.
_MAX_DIGITS = 400
# Endings of the multiples of a number. Each is a part of a pattern.
_MAX_ENDINGS = 2000


class Bound(NamedTuple):
    """One end of a range."""

    value: Decimal
    exclusive: bool = False


class NumberRange(NamedTuple):
    """The condition on a number.

    Attributes:
        low: the lower bound, or None.
        high: the upper bound, or None.
        integer: whether it must be an integer.
        steps: positive numbers. The number must be a multiple of each.
    """

    low: Bound | None
    high: Bound | None
    integer: bool
    steps: tuple[Fraction, ...] = ()


def number_patterns(wanted: NumberRange) -> list[list[str]]:
    """Return patterns of the JSON numbers in a range with at least one bound.

    Integers have no decimal point. No number has an exponent.

    Returns:
        alternatives; a text must match all expressions of one alternative. Empty if the range has no number.

    Raises:
        NotSupported: a bound has too many digits, or a step cannot be combined with the bounds.
    """
    if wanted.integer:
        return _integers(wanted)
    if wanted.steps:
        raise NotSupported(
            "multipleOf together with a bound beyond 2**53 is supported for integers only; "
            'write "type": "integer", or leave out one of the two'
        )
    zero = Decimal(0)
    found = []
    low, high = wanted.low, wanted.high
    if low and high and low.value == high.value and not (low.exclusive or high.exclusive):
        return [[_equal(low.value)]]
    if high is None or high.value >= zero:
        found += _fractions("", low if low and low.value >= zero else Bound(zero), high)
    if low is None or low.value < zero:
        least = _negate(high) if high and high.value <= zero else Bound(zero, True)
        found += _fractions("-", least, low and _negate(low))
    return found


def _integers(wanted: NumberRange) -> list[list[str]]:
    low = None if wanted.low is None else _least_integer(wanted.low)
    high = None if wanted.high is None else -_least_integer(_negate(wanted.high))
    step = lcm(*(step.numerator for step in wanted.steps))
    if low is not None and low == high:
        return [[str(low)]] if low % step == 0 else []
    steps = [] if step == 1 else [_multiples(step)]
    found = []
    if high is None or high >= 0:
        found.append(_between("", max(low or 0, 0), high))
    if low is None or low < 0:
        found.append(_between("-", 1 if high is None else max(1, -high), None if low is None else -low))
    return [[*patterns, *steps] for patterns in found if patterns]


def _least_integer(bound: Bound) -> int:
    """Return the smallest integer within a lower bound."""
    value = Fraction(bound.value)
    return floor(value) + 1 if bound.exclusive else ceil(value)


def _negate(bound: Bound) -> Bound:
    return Bound(bound.value.copy_negate(), bound.exclusive)


def _between(sign: str, low: int, high: int | None) -> list[str]:
    """Return patterns of the integers of one sign between two magnitudes; [] for an empty range."""
    if high is not None and high < low:
        return []
    upper = [] if high is None else [f"{sign}{_at_most(high)}"]
    return [f"{sign}{_at_least(low)}", *upper]


def _at_least(low: int) -> str:
    """Return a pattern of the integers without sign from `low` on."""
    digits = _digits_of(low)
    larger = "".join(f"|{option}" for option in _larger(digits, r"[0-9]{%d}"))
    return f"(?:{digits}{larger}|[1-9][0-9]{{{len(digits)},}})"


def _at_most(high: int) -> str:
    """Return a pattern of the integers without sign up to `high`."""
    digits = _digits_of(high)
    options = [digits, *_smaller(digits, r"[0-9]{%d}", first=1 if len(digits) > 1 else 0)]
    if len(digits) > 1:
        options += ["0", f"[1-9][0-9]{{0,{len(digits) - 2}}}"]
    return f"(?:{'|'.join(options)})"


def _larger(digits: str, rest: str) -> list[str]:
    """Return patterns of texts whose first different digit is larger than in `digits`; `rest` matches the rest."""
    return [
        f"{digits[:at]}[{int(digit) + 1}-9]{rest.replace('%d', str(len(digits) - at - 1))}"
        for at, digit in enumerate(digits)
        if digit != "9"
    ]


def _smaller(digits: str, rest: str, first: int = 0) -> list[str]:
    """Return patterns of texts whose first different digit is smaller than in `digits`, at least `first`."""
    return [
        f"{digits[:at]}[{least}-{int(digit) - 1}]{rest.replace('%d', str(len(digits) - at - 1))}"
        for at, digit in enumerate(digits)
        if int(digit) > (least := 0 if at else first)
    ]


def _fractions(sign: str, low: Bound, high: Bound | None) -> list[list[str]]:
    """Return alternatives for the numbers of one sign between two magnitudes; [] for an empty range."""
    if high is None:
        return [[sign + _fraction_at_least(low)]]
    if high.value < low.value or (high.value == low.value and (low.exclusive or high.exclusive)):
        return []
    return [[sign + _fraction_at_least(low), sign + _fraction_at_most(high)]]


def _equal(value: Decimal) -> str:
    """Return a pattern of one number, with any number of trailing zeros."""
    whole, fraction = _split(abs(value))
    end = f"\\.{fraction}0*" if fraction else "(?:\\.0+)?"
    return f"{'-' if value < 0 else ''}{whole}{end}"


def _fraction_at_least(low: Bound) -> str:
    whole, fraction = _split(low.value)
    options = [f"{_at_least(whole + 1)}(?:\\.[0-9]+)?"]
    above = "[0-9]*[1-9][0-9]*" if low.exclusive else "[0-9]*"
    larger = [f"{fraction}{above}" if fraction or low.exclusive else "[0-9]+", *_larger(fraction, "[0-9]*")]
    options.append(f"{whole}\\.(?:{'|'.join(larger)})")
    if not fraction and not low.exclusive:
        options.append(str(whole))
    return f"(?:{'|'.join(options)})"


def _fraction_at_most(high: Bound) -> str:
    whole, fraction = _split(high.value)
    options = [f"{_at_most(whole - 1)}(?:\\.[0-9]+)?"] if whole else []
    smaller = _smaller(fraction, "[0-9]*")
    # A prefix of the fraction is smaller, since `fraction` has no trailing zeros.
    smaller += (fraction[:end] for end in range(1, len(fraction)))
    if not high.exclusive:
        smaller.append(f"{fraction}0*" if fraction else "0+")
    if smaller:
        options.append(f"{whole}\\.(?:{'|'.join(smaller)})")
    if fraction or not high.exclusive:
        options.append(str(whole))
    return f"(?:{'|'.join(options)})" if options else "[a&&b]"


def _split(value: Decimal) -> tuple[int, str]:
    """Return the integer part of a non-negative number, and the digits after the decimal point."""
    if value and (value.adjusted() > _MAX_DIGITS or value.adjusted() < -_MAX_DIGITS):
        raise NotSupported(f"the bound {value:.3e} is out of range: at most {_MAX_DIGITS} digits are supported")
    text = format(value, "f")
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    _digits_of(int(whole))
    if len(fraction) > _MAX_DIGITS:
        raise NotSupported(
            f"a bound with {len(fraction)} digits after the decimal point; at most {_MAX_DIGITS} are supported"
        )
    return int(whole), fraction


def _digits_of(value: int) -> str:
    digits = str(value)
    if len(digits) > _MAX_DIGITS:
        raise NotSupported(f"a bound of {len(digits)} digits; at most {_MAX_DIGITS} are supported")
    return digits


def _multiples(step: int) -> str:
    """Return a pattern of the integers that a step divides. Their last digits must decide it."""
    n = 1
    while 10**n % step and n < 6:
        n += 1
    if 10**n % step or 10**n // step > _MAX_ENDINGS:
        raise NotSupported(
            f"multipleOf {step} together with a bound beyond 2**53 is not supported; "
            "only small products of 2 and 5 are; leave out one of the two"
        )
    short = "|".join(str(number) for number in range(0, 10**n, step))
    endings = "|".join(f"{number:0{n}}" for number in range(0, 10**n, step))
    return f"-?(?:{short}|[1-9][0-9]*(?:{endings}))"
