"""Mistakes in a configuration: collected, so that one check reports all of them, each with its file and line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from erllama.errors import Error, OptionError


class Mistake(NamedTuple):
    """A mistake: what is wrong, and where.

    Attributes:
        message: names the value, the limit and the remedy.
        file: the file that has it; None for an option of the command.
        line: of the file, from 1; None if no line is to blame.
        section: of the file, such as "models"; "" if no section is to blame.
    """

    message: str
    file: Path | None = None
    line: int | None = None
    section: str = ""

    def __str__(self) -> str:
        if self.file is None:
            return self.message
        where = f"{self.file}, line {self.line}" if self.line is not None else str(self.file)
        return f"{where}: {self.message}"


class ConfigurationError(OptionError):
    """A configuration has mistakes.

    Attributes:
        mistakes: all that were found, at least one. The message of the error is the first.
    """

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        more = len(mistakes) - 1
        hint = f" ({more} more; `erllama serve --check` lists them)" if more else ""
        super().__init__(f"{mistakes[0]}{hint}")


class Mistakes:
    """Collects mistakes.

    Attributes:
        found: in the order in which they were found.
    """

    def __init__(self) -> None:
        self.found: list[Mistake] = []

    def add(self, error: Exception, file: Path | None = None, line: int | None = None, section: str = "") -> None:
        """Add an error, and each mistake of a ConfigurationError."""
        if isinstance(error, ConfigurationError):
            self.found += error.mistakes
        else:
            self.found.append(Mistake(message_of(error), file, line, section))

    @contextmanager
    def collecting(self, file: Path | None = None, line: int | None = None, section: str = "") -> Iterator[None]:
        """Add the error that ends the `with` block, and continue after the block."""
        try:
            yield
        except (Error, OSError) as error:
            self.add(error, file, line, section)

    def check(self) -> None:
        """Raise ConfigurationError if there is a mistake."""
        if self.found:
            in_order = sorted(self.found, key=lambda each: (str(each.file or ""), each.line or 0))
            raise ConfigurationError(in_order)


def message_of(error: Exception) -> str:
    """Return an error as one message; for an OSError, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)
