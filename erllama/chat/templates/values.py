"""Values in templates besides plain data: methods, functions, namespaces, and tables of them.

Imports no other module of this package. `Machine` makes these values; `filters`, `methods` and `tests` fill the
tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from jinja2.exceptions import SecurityError
from markupsafe import Markup

SCALARS: Final = frozenset({bool, int, float, type(None)})
TEXTS: Final = frozenset({str, Markup})
SEQUENCES: Final = frozenset({list, tuple, range, type({}.keys()), type({}.values()), type({}.items())})


class ValueSize(NamedTuple):
    """The size of a value with all that it contains.

    Attributes:
        characters: approximate number of characters that writing it takes.
        parts: number of values.
        depth: how deep they are nested.
    """

    characters: int
    parts: int
    depth: int


class Method:
    """A method of a value, bound to it. A template can only call it."""

    __slots__ = ("name", "owner", "run")

    def __init__(self, run: Callable[..., object], owner: object, name: str) -> None:
        self.run, self.owner, self.name = run, owner, name


class Function:
    """A function for templates. A template can only call it."""

    __slots__ = ("name", "run")

    def __init__(self, run: Callable[..., object], name: str) -> None:
        self.run, self.name = run, name


class Namespace:
    """The result of `namespace()`: the only value that a template can change."""

    __slots__ = ("attributes",)

    def __init__(self, attributes: dict[str, object]) -> None:
        self.attributes: dict[str, object] = {}
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(
                f"a namespace cannot have the attribute {str(name)[:40]!r}: names that begin with '_' are reserved"
            )
        self.attributes[name] = value


class Tables(NamedTuple):
    """The names that a template can use.

    Attributes:
        filters, tests: functions of (machine, value, ...), by name.
        methods: functions of (machine, value, ...), by the value's type and by name.
        generation: the function that `{% generation %}` calls.
    """

    filters: Mapping[str, Callable[..., object]]
    tests: Mapping[str, Callable[..., object]]
    methods: Mapping[type, Mapping[str, Callable[..., object]]]
    generation: Function


def describe(value: object) -> str:
    """Return a description of a value by its type, for error messages."""
    return f"a value of type {type(value).__name__!r}"
