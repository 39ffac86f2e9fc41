"""What `erllama doctor` says of cache directories: whether they work, what they hold, how much room is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import erllama
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.tiers.directory import INDEX_NAME, file_system, is_cache
from erllama.cache.tiers.index_schema import SCHEMA_VERSION
from erllama.cli.cache.directories import IN_MEMORY, usual_directories
from erllama.cli.console import count, size
from erllama.cli.doctor.findings import Finding

_LITTLE_ROOM = 2 << 30  # some long contexts of a middling model
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "fuse.sshfs", "webdav"}


def directories(given: Sequence[Path]) -> Iterator[Finding]:
    """Of the directories that were named, or of the user's."""
    for path in [each.expanduser().absolute() for each in given] or usual_directories():
        yield from _directory(path)


def _directory(path: Path) -> Iterator[Finding]:
    what = f"directory {path}"
    if not is_cache(path):
        yield _not_yet(what, path)
        return
    try:
        with CacheFiles(path, in_memory=file_system(path) in IN_MEMORY) as files:
            rows = files.rows()
            stored = f"{count(len(rows), 'block')}, {size(sum(row.n_bytes for row in rows))}"
            use = ", in use by another process" if files.in_use else ""
    except (erllama.CacheError, OSError, sqlite3.Error) as error:
        # The message says what to do, after the reason.
        reason, _, mend = str(error).partition("; ")
        yield Finding(
            what, "wrong", reason.removeprefix(f"{path} "), mend or "give another directory, or remove this one"
        )
        return
    yield Finding(
        what, "ok", f"{stored}, index of version {SCHEMA_VERSION}, on {file_system(path) or 'a disk'}{use}"
    )
    damaged = [*(path / "damaged").iterdir(), *path.glob(f"{INDEX_NAME}.damaged-*")]
    if damaged:
        mend = f"look at the disk's health; then: rm {path}/damaged/* {path}/{INDEX_NAME}.damaged-*"
        yield Finding(what, "note", f"{count(len(damaged), 'file')} set aside as damaged", mend)
    yield from _room(what, path)


def _not_yet(what: str, path: Path) -> Finding:
    above = path
    while not above.exists() and above != above.parent:
        above = above.parent
    if path.exists() and not path.is_dir():
        return Finding(what, "wrong", "no directory", "give another directory")
    if not os.access(above, os.W_OK | os.X_OK):
        return Finding(what, "wrong", f"cannot be made: {above} is not yours to write to", f"chmod u+wx {above}")
    return Finding(what, "ok", "not made yet")


def _room(what: str, path: Path) -> Iterator[Finding]:
    kind = file_system(path)
    if kind in _NETWORK:
        mend = "give a directory on a local disk"
        yield Finding(what, "note", f"on {kind}: only processes of one machine may share it", mend)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path).free
        if free < _LITTLE_ROOM and kind not in IN_MEMORY:
            mend = f"erllama cache evict --dir {path} --older-than 7d"
            yield Finding(what, "note", f"only {size(free)} are free there", mend)
