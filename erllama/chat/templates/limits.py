"""Limits of chat templates, and the kinds of value that templates have besides plain data.

A leaf: `sandbox` holds renderings to the limits, and hands out the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from jinja2.exceptions import SecurityError
from markupsafe import Markup

# The processor time of one rendering. The largest conversations take a tenth of it.
MAX_SECONDS: Final = 10.0
# Steps of one rendering, of about a fifth of a microsecond each: what MAX_SECONDS allows, told the same
# on every machine. A conversation of ten thousand messages takes one or two millions.
MAX_STEPS: Final = 50_000_000
# Characters of one text, and of what is rendered: far beyond any context, well within memory.
MAX_TEXT: Final = 64 << 20
# Bytes of all that a rendering makes, whether it is dropped again or not, and how many more for each
# character it was given: templates copy a message some ten times over.
MAX_MEMORY: Final = 512 << 20
MEMORY_PER_CHARACTER: Final = 64
# Macros within macros: schemas of tools nest by tens at most, and a level takes some frames of Python's stack.
MAX_CALLS: Final = 48
# Values within values, as json and the interpreter walk them by recursion.
MAX_DEPTH: Final = 100
# Values that are walked over at once, to compare, write or sort them.
MAX_ITEMS: Final = 2_000_000
# Below the 4,300 digits at which Python refuses to write an integer, a check that a process may turn off.
MAX_INT_BITS: Final = 4096
# Characters that strip() takes, or a format writes a number with.
MAX_CHARACTERS: Final = 256

SCALARS: Final = frozenset({bool, int, float, type(None)})
TEXTS: Final = frozenset({str, Markup})


class LimitExceeded(Exception):  # noqa: N818 - reads as what happened
    """A template asks for more than a template may. Nothing a template can do catches it."""


class Weight(NamedTuple):
    """What a value holds: characters it takes to write, about; values; how deep they are nested."""

    text: int
    parts: int
    depth: int


class Method:
    """A method of a value, as a template holds it: nothing but callable."""

    __slots__ = ("name", "owner", "run")

    def __init__(self, run: Callable[..., object], owner: object, name: str) -> None:
        self.run, self.owner, self.name = run, owner, name


class Function:
    """A function given to templates: nothing but callable."""

    __slots__ = ("name", "run")

    def __init__(self, run: Callable[..., object], name: str) -> None:
        self.run, self.name = run, name


class Namespace:
    """What `namespace()` makes: the one value that a template changes."""

    __slots__ = ("attributes",)

    def __init__(self, attributes: dict[str, object]) -> None:
        self.attributes: dict[str, object] = {}
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(
                f"a namespace takes no attribute {str(name)[:40]!r}: names that begin with '_' are kept"
            )
        self.attributes[name] = value


class Tables(NamedTuple):
    """What templates have by name.

    Attributes:
        filters, tests: functions of (machine, value, ...).
        methods: by the value's type, functions of (machine, value, ...).
        generation: what `{% generation %}` calls.
    """

    filters: Mapping[str, Callable[..., object]]
    tests: Mapping[str, Callable[..., object]]
    methods: Mapping[type, Mapping[str, Callable[..., object]]]
    generation: Function


def described(value: object) -> str:
    """A value by its kind, for messages."""
    return f"a value of type {type(value).__name__!r}"
