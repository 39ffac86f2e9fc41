"""Where files of the Hugging Face hub belong: in the cache of huggingface_hub, or in a directory of the user."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from erllama.models.stores.walk import read_small

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: its place, its size in bytes, and its digest as `transfer` takes it."""

    name: str
    n_bytes: int
    digest: str


class CachePlace:
    """The cache as the place of files: blobs, and a snapshot with links to them."""

    def __init__(self, folder: Path, commit: str) -> None:
        self._folder, self._snapshot = folder, folder / "snapshots" / commit

    def target(self, file: HubFile) -> Path:
        """Return where the content of a file belongs."""
        return self._folder / "blobs" / file.digest

    def remove_damaged(self, target: Path) -> None:
        """Remove content with the wrong digest, if there is any."""
        target.unlink(missing_ok=True)

    def link(self, file: HubFile) -> Path:
        """Give the content its name, and return its path."""
        pointer = self._snapshot / PurePosixPath(file.name)
        _link(pointer, self.target(file))
        return pointer


class DirectoryPlace:
    """A directory of the user as the place of files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def target(self, file: HubFile) -> Path:
        """Return where the content of a file belongs."""
        return self._root / PurePosixPath(file.name)

    def remove_damaged(self, target: Path) -> None:
        """Leave the file, which may be the user's own, until its replacement is complete."""

    def link(self, file: HubFile) -> Path:
        """Return the path: the content has its name already."""
        return self.target(file)


def snapshot(folder: Path, revision: str | None) -> Path | None:
    """Return the directory of a revision in the cache; None if the cache does not have it."""
    commit = revision if revision and COMMIT.fullmatch(revision) else _read_reference(folder, revision or "main")
    return folder / "snapshots" / commit if commit else None


def write_reference(folder: Path, revision: str, commit: str) -> None:
    """Write which commit a branch or a tag of the cache is."""
    if is_inside(revision):
        path = folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="ascii")


def is_inside(name: str) -> bool:
    """Return whether the name of a file stays inside the directory of its repository."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


def _link(pointer: Path, blob: Path) -> None:
    """Make a file of a snapshot: a relative link to its blob, or the blob itself where there are no links."""
    if pointer.exists():
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    try:
        pointer.unlink(missing_ok=True)  # a link whose blob was missing
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        blob.replace(pointer)


def _read_reference(folder: Path, revision: str) -> str:
    if not is_inside(revision):
        return ""
    commit = (read_small(folder / "refs" / revision) or b"").decode("ascii", "replace").strip()
    return commit if COMMIT.fullmatch(commit) else ""
