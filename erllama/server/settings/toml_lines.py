"""Lines of a TOML file: which line sets an option. Python's parser returns values without their lines."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping

# Names of tables and options from the outside in; for an entry of a list of tables, its index follows the name.
Place = tuple[str | int, ...]


def toml_lines(text: str) -> dict[Place, int]:
    """Return the number of the line that sets each option, and of the header of each table, from 1.

    A value that spans several lines has the number of its first one. So do all options of an inline table.

    Args:
        text: valid TOML.
    """
    lines: dict[Place, int] = {}
    n_entries: dict[Place, int] = {}  # of each list of tables
    table: Place = ()
    for number, statement, found in _statements(text):
        if statement.lstrip().startswith("["):
            table = _table(found, n_entries)
            for length in range(1, len(table) + 1):
                lines.setdefault(table[:length], number)
        else:
            for place in _places(found):
                lines.setdefault(table + place, number)
    return lines


# What ends a value of several lines.
_ENDS = ("]", "}", '"""', "'''")


def _statements(text: str) -> Iterator[tuple[int, str, Mapping[str, object]]]:
    """Yield each header and each assignment, with its first line and its own value as a file of its own."""
    pending: list[str] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        pending.append(line)
        if len(pending) > 1 and not any(end in line for end in _ENDS):
            continue  # without parsing what is long again
        statement = "\n".join(pending)
        try:
            found = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # the value continues on the next line
        if found:
            yield number - len(pending) + 1, statement, found
        pending.clear()


def _table(found: Mapping[str, object], n_entries: dict[Place, int]) -> Place:
    """Return the place of a table from its header. `[[name]]` adds an entry; `[name.more]` is in the last one."""
    place: Place = ()
    while found:
        name, value = next(iter(found.items()))
        place += (name,)
        if isinstance(value, list):
            n_entries[place] = n_entries.get(place, 0) + 1
            value = value[0]
        if place in n_entries:
            place += (n_entries[place] - 1,)
        assert isinstance(value, Mapping)
        found = value
    return place


def _places(value: object, outer: Place = ()) -> Iterator[Place]:
    """Yield the places within a value: of tables, of their options, and of entries of lists."""
    inner: list[tuple[str | int, object]] = []
    if isinstance(value, Mapping):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    for name, each in inner:
        yield (*outer, name)
        yield from _places(each, (*outer, name))
