"""Checks of `erllama doctor`: state, contents and free space of the cache directories."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import erllama
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.sizes import format_size
from erllama.cache.tiers.directory import file_system, is_cache
from erllama.cache.tiers.file_names import INDEX_NAME
from erllama.cache.tiers.index_schema import SCHEMA_VERSION
from erllama.cli.cache.directories import MEMORY_FILE_SYSTEMS, default_directories
from erllama.cli.console import format_count
from erllama.cli.doctor.findings import Finding

_MIN_FREE_BYTES = 2 << 30  # a few long contexts of a medium-sized model
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "fuse.sshfs", "webdav"}


def check_directories(paths: Sequence[Path]) -> Iterator[Finding]:
    """Check the directories that the user named, or the user's own."""
    for path in [each.expanduser().absolute() for each in paths] or default_directories():
        yield from _check_directory(path)


def _check_directory(path: Path) -> Iterator[Finding]:
    name = f"directory {path}"
    if not is_cache(path):
        yield _check_missing(name, path)
        return
    try:
        with CacheFiles(path, in_memory=file_system(path) in MEMORY_FILE_SYSTEMS) as files:
            rows = files.rows()
            stored = f"{format_count(len(rows), 'block')}, {format_size(sum(row.n_bytes for row in rows))}"
            in_use = ", in use by another process" if files.in_use else ""
    except (erllama.CacheError, OSError, sqlite3.Error) as error:
        # Messages have the form "reason; fix".
        reason, _, fix = str(error).partition("; ")
        yield Finding(
            name, "error", reason.removeprefix(f"{path} "), fix or "use another directory, or remove this one"
        )
        return
    yield Finding(
        name, "ok", f"{stored}, index version {SCHEMA_VERSION}, on {file_system(path) or 'a disk'}{in_use}"
    )
    damaged = [*path.glob("damaged/*"), *path.glob(f"{INDEX_NAME}.damaged-*")]
    if damaged:
        fix = f"check the disk for errors; then: rm {path}/damaged/* {path}/{INDEX_NAME}.damaged-*"
        yield Finding(name, "warning", f"contains {format_count(len(damaged), 'damaged file')}", fix)
    yield from _check_file_system(name, path)


def _check_missing(name: str, path: Path) -> Finding:
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if path.exists() and not path.is_dir():
        return Finding(name, "error", "not a directory", "use another directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        return Finding(name, "error", f"cannot be created: {parent} is not writable", f"chmod u+wx {parent}")
    return Finding(name, "ok", "does not exist yet")


def _check_file_system(name: str, path: Path) -> Iterator[Finding]:
    kind = file_system(path)
    if kind in _NETWORK_FILE_SYSTEMS:
        fix = "use a directory on a local disk"
        yield Finding(name, "warning", f"on {kind}: only processes of one machine may share it", fix)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path).free
        if free < _MIN_FREE_BYTES and kind not in MEMORY_FILE_SYSTEMS:
            fix = f"erllama cache evict --dir {path} --older-than 7d"
            yield Finding(name, "warning", f"only {format_size(free)} of disk space free", fix)
