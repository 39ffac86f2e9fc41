"""Finds, runs and reports the rules for tiers and for backends.

A rule is a method whose name begins with `test_`. Its docstring states the rule. The method returns if the rule
holds, raises `unittest.SkipTest` if it does not apply, and raises AssertionError if it is broken.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import SkipTest


def require(condition: object, message: str) -> None:
    """Raise AssertionError with `message` if the condition is false."""
    # Not an assert statement: -O removes those, and pytest does not rewrite those of a library.
    if not condition:
        raise AssertionError(message)


@contextmanager
def expect_success(rule: str) -> Iterator[None]:
    """Turn any exception into an AssertionError that states the rule."""
    try:
        yield
    except (AssertionError, SkipTest):
        raise
    except Exception as error:
        raise AssertionError(f"{rule}; it raised {type(error).__name__}: {error}") from error


def rule_names(rules: object) -> list[str]:
    """Return the names of all rules: first those of the class itself, then those of its bases."""
    names: dict[str, None] = {}
    for kind in type(rules).__mro__:
        names |= dict.fromkeys(name for name in vars(kind) if name.startswith("test_"))
    return list(names)


def check_rules(rules: object) -> None:
    """Run all rules until one is broken.

    Raises:
        AssertionError: a rule is broken. The message contains its name, its text, and what was found.
    """
    for name in rule_names(rules):
        rule = getattr(rules, name)
        stated = " ".join((rule.__doc__ or name).split())
        try:
            rule()
        except SkipTest:
            continue
        except Exception as error:
            found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{found}\nBroken rule ({name}): {stated}") from error


@contextmanager
def frequent_thread_switches() -> Iterator[None]:
    """Make Python switch threads as often as possible during the `with` block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
