"""Reads directories of other programs within limits: of depth, of entries, and of the bytes of a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from erllama._runtime.log import logger

log = logger("erllama.models")

MAX_DEPTH = 8  # LM Studio's store has two levels, and a snapshot of a repository rarely more than three
MAX_ENTRIES = 20_000  # of one directory tree; a store of a thousand models has fewer
_MAX_TEXT = 1 << 20  # bytes of a manifest; Ollama's have about one kilobyte


def walk(root: Path, *, suffixes: tuple[str, ...] = (".gguf",)) -> Iterator[Path]:
    """Yield the files below a directory whose names end so, in any case. Follows links, and skips hidden entries.

    Stops after MAX_ENTRIES entries, with a warning. A directory that cannot be read is skipped.
    """
    n_left = MAX_ENTRIES
    seen: set[tuple[int, int]] = set()
    pending = [(root, 0)]
    while pending:
        directory, depth = pending.pop()
        for entry in entries(directory, seen):
            n_left -= 1
            if n_left < 0:
                log.warning("%s has more than %d entries; the others are not listed", root, MAX_ENTRIES)
                return
            if entry.name.lower().endswith(suffixes):
                yield Path(entry.path)
            elif depth < MAX_DEPTH and _is_directory(entry):
                pending.append((Path(entry.path), depth + 1))


def entries(directory: Path, seen: set[tuple[int, int]] | None = None) -> list[os.DirEntry[str]]:
    """Return the entries of a directory that are not hidden, by name; none if it cannot be read.

    Args:
        seen: the directories that were read before, which have no entries. This one is added.
    """
    try:
        if seen is not None:
            status = directory.stat()
            if (status.st_dev, status.st_ino) in seen:
                return []
            seen.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as found:
            return sorted((each for each in found if not each.name.startswith(".")), key=lambda each: each.name)
    except OSError:  # missing, not a directory, or of another user
        return []


def directories(parent: Path) -> list[Path]:
    """Return the directories in a directory that are not hidden, by name; links to directories, too."""
    return [Path(entry.path) for entry in entries(parent) if _is_directory(entry)]


def read_small(path: Path) -> bytes | None:
    """Return the bytes of a small regular file; None if it is missing, no such file, or larger than 1 MiB."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(_MAX_TEXT + 1)
    except OSError:
        return None
    return content if len(content) <= _MAX_TEXT else None


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
