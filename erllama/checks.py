"""Validators of options and arguments, and the import of optional packages.

Each validator returns the checked value or raises `OptionError`. Every layer but `llama_ffi` calls them, so this
module imports `erllama.errors` alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

from erllama.errors import MissingPackage, ModelUnloaded, OptionError

_LONGEST_SHOWN = 60
_SECONDS = {"ms": 0.001, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_SECONDS)})\s*")
# Stricter than difflib's default of 0.6, which suggests "top_p" for a misspelt "stop".
_SIMILARITY = 0.7


def shown(value: object) -> str:
    """Return the repr of a value for an error message, at most 60 characters; its type if repr() fails."""
    try:
        text = repr(value)
    except Exception:  # nested too deeply, an integer of too many digits, or a faulty __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def check_not_forked(model_id: str, process: int) -> None:
    """Raise ModelUnloaded in a process that was forked from the one that loaded a model.

    Args:
        process: number of the process that loaded the model.
    """
    if process != os.getpid():
        raise ModelUnloaded(
            f"model {model_id!r} was loaded before this process was forked and does not run in it; "
            "load models after forking, or start workers with multiprocessing's 'spawn' method"
        )


def check_loaded(model_id: str, process: int, *, stopped: bool) -> None:
    """Raise ModelUnloaded if a model cannot be used: its process was forked, or it is unloaded.

    Args:
        process: number of the process that loaded the model.
        stopped: whether the model is unloaded, or is being unloaded.
    """
    check_not_forked(model_id, process)
    if stopped:
        raise ModelUnloaded(f"model {model_id!r} is unloaded; load it again to use it")


def reject_unknown(unknown: Mapping[str, object], known: Collection[str], where: str) -> None:
    """Raise OptionError for the first name in `unknown`, with the most similar name of `known`."""
    for name in unknown:
        similar = _most_similar(name, known)
        hint = f"did you mean {similar!r}?" if similar else f"it takes {', '.join(sorted(known))}"
        raise OptionError(f"{where} has no option {name!r}; {hint}")


def integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return `value` as an int; raise OptionError if it is not an integer within the limits."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise OptionError(f"{name} must be an integer, not {shown(value)}")
    try:
        number = int(value.__index__())
    except TypeError:
        raise OptionError(f"{name} must be an integer, not {shown(value)}") from None
    _check_range(name, number, minimum, maximum)
    return number


def real(name: str, value: object, minimum: float | None = None, maximum: float | None = None) -> float:
    """Return `value` as a float; raise OptionError if it is not a finite number within the limits."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise OptionError(f"{name} must be a number, not {shown(value)}")
    try:
        number = float(value.__float__())
    except (OverflowError, TypeError, ValueError):
        raise OptionError(f"{name} must be a finite number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise OptionError(f"{name} must be finite, not {shown(value)}")
    _check_range(name, number, minimum, maximum)
    return number


def seconds(name: str, value: object) -> float:
    """Return a duration in seconds: a number of seconds, or a text such as "90s", "30min", "1h30m" or "7d".

    Raises:
        OptionError: it is not a duration of at most a hundred years.
    """
    if isinstance(value, str):
        if not re.fullmatch(rf"\s*(?:{_DURATION.pattern})+", value):
            raise OptionError(f"{name}={shown(value)}; pass seconds, or a text such as 90s, 30min, 1h30m or 7d")
        value = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(value))
    return real(name, value, 0, 100 * 366 * _SECONDS["d"])


def boolean(name: str, value: object) -> bool:
    """Return `value`; raise OptionError if it is neither True nor False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {shown(value)}")
    return value


def encodable(name: str, value: str) -> str:
    """Return `value`; raise OptionError if it holds half a surrogate pair, which UTF-8 cannot encode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{name}: {shown(value)} has half a surrogate pair, which UTF-8 cannot encode") from None
    return value


def choice(name: str, value: object, known: Collection[str]) -> str:
    """Return `value`; raise OptionError, with the most similar of `known`, if it is not one of `known`."""
    if not isinstance(value, str) or value not in known:
        similar = _most_similar(value if isinstance(value, str) else "", known)
        hint = f"; did you mean {similar!r}?" if similar else ""
        raise OptionError(f"{name}={shown(value)}; it takes {', '.join(map(repr, known))}{hint}")
    return value


def import_optional(module: str, *, needed_by: str, package: str, install: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: the module's name.
        needed_by: the module or the feature that needs it, for the error message.
        package: the name of its package in the package index.
        install: the argument of `pip install` that installs it.

    Raises:
        MissingPackage: the package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        message = f"{needed_by} needs {package}: pip install {install}"
        raise MissingPackage(message, name=module) from error


def _most_similar(name: str, known: Collection[str]) -> str | None:
    return next(iter(get_close_matches(name, known, n=1, cutoff=_SIMILARITY)), None)


def _check_range(name: str, number: float, minimum: float | None, maximum: float | None) -> None:
    if minimum is not None and number < minimum:
        raise OptionError(f"{name}={shown(number)}; it must be at least {minimum}")
    if maximum is not None and number > maximum:
        raise OptionError(f"{name}={shown(number)}; it must be at most {maximum}")
