"""Strict reading of JSON, and plain copies of values that callers and models supply.

Reading takes time in proportion to the text. Values nested deeper than `MAX_NESTING` are refused, so that no later
reader or writer of them runs out of stack. A refused value raises `InvalidValueError` with its position.
`erllama.chat.messages` and `erllama.chat.tool_calls` turn it into their own errors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal

WHITE_SPACE = " \t\r\n"  # as JSON defines it
# Far more levels than arguments have, and few enough for every JSON reader.
MAX_NESTING = 100
# Python writes integers of up to 4,300 digits.
_MAX_DIGITS = 4000
_LEADING_SPACE = re.compile(f"[{WHITE_SPACE}]*")
TOO_DEEP = f"nested deeper than {MAX_NESTING} levels"


class InvalidValueError(ValueError):
    """A text or value that cannot be read.

    Attributes:
        at: position in the text, in characters from 0.
    """

    def __init__(self, problem: str, at: int = 0) -> None:
        super().__init__(problem)
        self.at = at


def read_json(text: str, at: int = 0) -> tuple[object, int]:
    """Return the JSON value that begins at `at`, and its end. The last value of a repeated key is used.

    Raises:
        InvalidValueError: no JSON value begins there; or it has a number of more than 4,000 digits, or text that
            is not Unicode.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
        return copy_json_value(value), end
    except json.JSONDecodeError as error:
        raise InvalidValueError(error.msg, error.pos) from None
    except RecursionError:
        raise InvalidValueError(TOO_DEEP, at) from None
    except InvalidValueError as error:
        raise InvalidValueError(str(error), at) from None
    except ValueError:
        raise InvalidValueError("a number with too many digits", at) from None


def parse_json(text: str) -> object:
    """Return the JSON value of a text. White space around it is allowed.

    Raises:
        InvalidValueError: the text is not a JSON value, or has more text after it.
    """
    value, end = read_json(text, skip_white_space(text, 0))
    end = skip_white_space(text, end)
    if end < len(text):
        raise InvalidValueError("more text after the JSON", end)
    return value


def copy_json_value(value: object) -> object:
    """Return a fresh copy of a JSON value, made of dict, list, str, int, float, bool and None.

    Raises:
        InvalidValueError: a part of it is of another type, is not a finite number, cannot be encoded as UTF-8, or
            is nested too deeply.
    """
    return _copy(value, MAX_NESTING)


def check_text(value: str) -> str:
    """Return a text as exactly a `str`.

    Raises:
        InvalidValueError: it has half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidValueError(
            f"character {error.start} is half of a surrogate pair, which UTF-8 cannot encode", error.start
        ) from None
    return str.__str__(value)


def skip_white_space(text: str, at: int) -> int:
    """Return the end of the white space that begins at `at`."""
    match = _LEADING_SPACE.match(text, at)
    return match.end() if match else at


def _copy(value: object, levels: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidValueError(f"{value} is not a JSON number")
        return float.__float__(value)
    if not levels:
        raise InvalidValueError(TOO_DEEP)
    if isinstance(value, Mapping):
        return {_check_key(key): _copy(part, levels - 1) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(part, levels - 1) for part in value]
    raise InvalidValueError(f"{type(value).__name__} is not a JSON type")


def _check_key(key: object) -> str:
    if not isinstance(key, str):
        raise InvalidValueError(f"{key!r:.40} is a key; JSON keys are strings")
    return check_text(key)


def _parse_float(digits: str) -> float | int:
    """Return a number with a point or an exponent: a float, or an int for an integer larger than any float."""
    number = float(digits)
    if math.isfinite(number):
        return number
    try:
        exact = Decimal(digits)
        too_long = exact.adjusted() >= _MAX_DIGITS
    except ArithmeticError:  # the exponent has 19 digits or more
        too_long = True
    if too_long:
        raise InvalidValueError(
            f"{digits[:40]} is a number with too many digits: at most {_MAX_DIGITS} are supported"
        )
    if exact != int(exact):
        raise InvalidValueError(f"{digits[:40]} is larger than any float, and not an integer")
    return int(exact)


def _refuse_constant(constant: str) -> object:
    raise InvalidValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_parse_float, parse_constant=_refuse_constant)
