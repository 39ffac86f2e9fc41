"""What the rules of tiers and of backends share: how a broken promise is reported, and how all rules are run.

A rule is a method whose name begins with `test_`. Its docstring states the promise. It returns where the
promise is kept, raises `unittest.SkipTest` where it does not apply, and raises AssertionError where it is broken.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import SkipTest


def must(holds: object, otherwise: str) -> None:
    """Raise AssertionError with a message where `holds` is false."""
    # No bare assert: they are gone under -O, and pytest does not rewrite those of a library.
    if not holds:
        raise AssertionError(otherwise)


@contextmanager
def promised(promise: str) -> Iterator[None]:
    """Turn any exception into an AssertionError that names the promise."""
    try:
        yield
    except (AssertionError, SkipTest):
        raise
    except Exception as error:
        raise AssertionError(f"{promise}; it raised {type(error).__name__}: {error}") from error


def rules_of(rules: object) -> list[str]:
    """The names of all rules: those of the class itself first, then those of its bases."""
    names: dict[str, None] = {}
    for kind in type(rules).__mro__:
        names |= dict.fromkeys(name for name in vars(kind) if name.startswith("test_"))
    return list(names)


def check_rules(rules: object) -> None:
    """Run all rules.

    Raises:
        AssertionError: the first one that is broken; the message has its name, its promise, and what was found.
    """
    for name in rules_of(rules):
        rule = getattr(rules, name)
        stated = " ".join((rule.__doc__ or name).split())
        try:
            rule()
        except SkipTest:
            continue
        except Exception as error:
            found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{found}\nThe broken promise ({name}): {stated}") from error


@contextmanager
def quick_switches() -> Iterator[None]:
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
