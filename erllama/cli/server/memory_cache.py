"""A cache in memory for models in processes of their own: `serve --no-cache`.

A RAM tier ends with its process, so such models save to a directory on a tmpfs. The user's own one would keep the
prompts after the server's end. So each server has one of its own, which it removes. A server that was killed leaves
its directory behind. The next one removes it: the lock on its lock file is then free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import erllama
from erllama.cache.sizes import parse_bytes

_TMPFS = Path("/dev/shm")
_MIN_BYTES = 64 << 20  # as `Cache` requires of a directory that it adds
_DEFAULT_BYTES = "2GiB"  # of the RAM tier of `Cache`


@contextmanager
def memory_cache(options: Mapping[str, object], parent: Path = _TMPFS) -> Iterator[erllama.Cache]:
    """Yield a cache that keeps nothing beyond the `with` block.

    Args:
        options: of `Cache`. Those of directories are ignored.
        parent: on a tmpfs. Without one of at least 128 MiB, the cache has a RAM tier, and saves end with a model's
            process.
    """
    kept = {
        name: value for name, value in options.items() if not name.startswith(("disk", "ram_file", "read_only"))
    }
    budget = parse_bytes("ram", kept.get("ram", _DEFAULT_BYTES))
    room = shutil.disk_usage(parent).total // 2 if parent.is_dir() else 0
    if not budget or room < _MIN_BYTES:
        with erllama.Cache(**kept) as cache:  # type: ignore[arg-type]
            yield cache
        return
    kept |= {"ram": None, "ram_file_quota": min(budget, room)}
    with _own_directory(parent) as directory, erllama.Cache(**kept, ram_file=directory / "cache") as cache:  # type: ignore[arg-type]
        yield cache


@contextmanager
def _own_directory(parent: Path) -> Iterator[Path]:
    """Yield a new directory that only this user can read, and remove it at the end. Remove leftovers, too."""
    prefix = f"erllama-{os.geteuid()}-server-"
    for left in parent.glob(f"{prefix}*"):
        _remove_unless_locked(left)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    # Locked under another name first: no other server finds it without its lock.
    lock = os.open(directory / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "lock.new").rename(directory / "lock")
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _remove_unless_locked(directory: Path) -> None:
    """Remove the directory of a server that has ended. One without a lock file is being made, or removed."""
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        pass  # its server runs
    finally:
        os.close(lock)
