"""Layout of a cache directory, and the locks by which processes share it.

    <root>/index.db       the list of the stored blocks
    <root>/blocks/        one file per block, named by its key, or by its encrypted key
    <root>/partial/       files being written
    <root>/owners/        one locked file for every process that has the directory open
    <root>/damaged/       the last few files that were invalid
    <root>/signing-key    signs thinking, if the directory is that of a server
    <root>/responses.sqlite  what a server keeps of conversations

A process that has the directory open holds a lock on its own file in `owners/`. The operating system releases the
lock when the process ends, even by a crash. A lock that another process can take therefore belongs to a process
that has ended, and the files which that process left in `partial/` can be removed. File tiers and the `erllama
cache` commands use this module.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from erllama._runtime.log import logger
from erllama.cache.blocks import kvc
from erllama.cache.tiers.file_names import BLOCK_FILE, INDEX_NAME
from erllama.errors import CacheError

log = logger("erllama.cache")

# Names of a cache, and of what else the user's cache directory contains. The mode of a directory with other names
# in it is not changed.
_OWN_NAMES = {"blocks", "partial", "owners", "damaged", "llama", "models", "responses.sqlite", "signing-key"}
_DAMAGED_KEPT = 8  # enough to find the cause; they count towards no budget
_LOCK_SUFFIX = ".lock"
_ID_BYTES = 8  # the name of an owner is the id of its cache and one of its own, both random
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "fuse.sshfs", "webdav"}


def new_cache_id() -> str:
    """Return a random id for a cache, as text."""
    return secrets.token_hex(_ID_BYTES)


class CacheDirectory:
    """A cache directory that this process has locked. Created if missing.

    Args:
        cache_id: the id of the cache that opens the directory. It shows other caches what that cache has open. None
            for a new id.

    Raises (from the constructor):
        CacheError: the directory is not private to this user, is a link, lies in another cache, or cannot be
            locked.
        OSError: the directory cannot be created or used.
    """

    def __init__(self, root: Path, cache_id: str | None = None) -> None:
        self.root = root
        self.index = root / INDEX_NAME
        self.blocks = root / "blocks"
        self.partial = root / "partial"
        self.owners = root / "owners"
        self.damaged = root / "damaged"
        _refuse_nested(root)
        for directory in (root, self.blocks, self.partial, self.owners, self.damaged):
            _ensure_private(directory)
        self._serial = itertools.count()
        self._process = os.getpid()
        self._cache_id = cache_id or new_cache_id()
        self.owner, self._lock = self._take_lock()

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            self.leave()
        else:
            self.close()

    def close(self) -> None:
        """Release the lock. Idempotent. A forked child may call it without effect on its parent."""
        # The lock stays the parent's until the parent closes its descriptor; a child closes its own copy.
        lock, self._lock = getattr(self, "_lock", -1), -1
        if lock >= 0:
            with contextlib.suppress(OSError):
                os.close(lock)

    def leave(self) -> None:
        """Remove the lock file, and release the lock."""
        if getattr(self, "_lock", -1) >= 0:
            with contextlib.suppress(OSError):
                self._lock_path(self.owner).unlink()
        self.close()

    @property
    def is_complete(self) -> bool:
        """Whether the lock file, `blocks/` and `partial/` are still in place.

        Raises:
            OSError: they cannot be examined now.
        """
        try:
            lock_in_place = self._lock_path(self.owner).stat().st_ino == os.fstat(self._lock).st_ino
            return lock_in_place and all(stat.S_ISDIR(path.stat().st_mode) for path in (self.blocks, self.partial))
        except (FileNotFoundError, NotADirectoryError):  # other errors do not prove it
            return False

    def new_partial(self) -> Path:
        """Return an unused path in `partial/`."""
        return self.partial / f"{self.owner}-{next(self._serial)}{kvc.SUFFIX}"

    def block_files(self) -> Iterator[os.DirEntry[str]]:
        """Yield every entry of `blocks/`, valid or not."""
        with os.scandir(self.blocks) as entries:
            yield from entries

    def quarantine(self, path: Path) -> None:
        """Move a file to `damaged/`, and remove the oldest files there."""
        path.rename(self.damaged / f"{time.time_ns()}-{path.name}")
        for old in sorted(self.damaged.iterdir())[:-_DAMAGED_KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()

    # --- owners and their locks

    def sharers(self) -> set[str]:
        """Return the ids of the other caches, of this process and of others, that have the directory open."""
        alive = [owner for owner in self._owners() if owner != self.owner and self.is_alive(owner)]
        return {owner[: 2 * _ID_BYTES] for owner in alive}

    def is_alive(self, owner: str) -> bool:
        """Return whether `owner` still has the directory open.

        Only a missing lock file, or a lock that this process can take, proves that it has not. If this process
        cannot examine the lock, for lack of descriptors or another reason, the result is True.
        """
        if owner == self.owner:
            return True
        try:
            lock = os.open(self._lock_path(owner), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False

    def owner_of(self, partial: Path) -> str:
        """Return the owner that writes a file in `partial/`."""
        return partial.name.split("-", 1)[0]

    def remove_leftovers(self) -> None:
        """Remove leftovers of ended processes: their files, then the lock files that identify their owners."""
        self.remove_leftover_files()
        for owner in self._owners():
            self._remove_lock_file(owner)

    def remove_leftover_files(self) -> None:
        """Remove the files that ended processes left in `partial/`."""
        for path in self.partial.iterdir():
            if not self.is_alive(self.owner_of(path)):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _remove_lock_file(self, owner: str) -> None:
        """Remove the lock file of an ended process, while holding its lock: no process can take it meanwhile."""
        path = self._lock_path(owner)
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(lock)

    def _owners(self) -> list[str]:
        names = os.listdir(self.owners)
        return [name.removesuffix(_LOCK_SUFFIX) for name in names if name.endswith(_LOCK_SUFFIX)]

    def _lock_path(self, owner: str) -> Path:
        return self.owners / f"{owner}{_LOCK_SUFFIX}"

    def _take_lock(self) -> tuple[str, int]:
        while True:
            owner = f"{self._cache_id}{secrets.token_hex(_ID_BYTES)}"
            path = self._lock_path(owner)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._check_locks(path)
            except (BlockingIOError, FileNotFoundError):
                os.close(lock)  # a process that removes leftovers took the lock between open and flock
                continue
            except OSError as error:
                os.close(lock)
                path.unlink(missing_ok=True)
                raise CacheError(
                    f"{self.root} is on a file system without locks ({error}), so processes cannot share it; "
                    "use a directory on a local disk"
                ) from error
            except BaseException:
                os.close(lock)
                path.unlink(missing_ok=True)
                raise
            with contextlib.suppress(OSError):
                if path.stat().st_ino == os.fstat(lock).st_ino:
                    return owner, lock
            os.close(lock)  # another process removed the file between open and flock

    def _check_locks(self, path: Path) -> None:
        """Raise CacheError on a file system that grants one lock several times, as some network file systems do."""
        second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        finally:
            os.close(second)
        raise CacheError(
            f"{self.root} is on a file system whose locks have no effect; use a directory on a local disk"
        )


def warn_about_file_system(root: Path, in_memory: bool) -> None:
    """Log a warning if `root` is on a network file system, or is not in memory where it should be."""
    type_name = file_system(root)
    if in_memory and type_name and type_name not in _MEMORY_FILE_SYSTEMS:
        log.warning("ram_file=%s is on %s, not in memory; use a directory on a tmpfs", root, type_name)
    if type_name in _NETWORK_FILE_SYSTEMS:
        log.warning("%s is on %s; only processes of one machine may share it", root, type_name)


def file_system(path: Path) -> str:
    """Return the type of the file system that contains a path, such as "ext4"; "" if unknown."""
    try:
        mounts = [(m.mountpoint, m.fstype) for m in psutil.disk_partitions(all=True)]
    except (OSError, RuntimeError):
        return ""
    real = os.path.realpath(path)
    # The longest mount point that contains the path; of several file systems on one point, the last.
    best = ("", "")
    for point, type_name in mounts:
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, type_name)
    return best[1]


def _refuse_nested(root: Path) -> None:
    """Raise CacheError if `root` lies in a cache or contains one: two caches must not count the same files."""
    for above in root.parents:
        if is_cache(above):
            raise CacheError(f"{root} lies in the cache directory {above}; use a directory of its own, or {above}")
    if root.is_dir() and not is_cache(root):
        for below in root.iterdir():
            if below.is_dir() and is_cache(below):
                raise CacheError(f"{root} holds the cache directory {below}; use another directory, or {below}")


def is_cache(root: Path) -> bool:
    """Return whether a directory holds a cache, empty or not. Does not open or change it.

    A cache has `blocks/` and at least one of the index, `partial/` and a block file. One of the three
    is enough, because each may be missing: the index is rebuilt from the files when it was deleted, a copy made
    by a tool that skips empty directories has no `partial/`, and a new cache has no block. `blocks/` alone is not
    enough: many programs have a directory of that name.
    """
    blocks = root / "blocks"
    if not blocks.is_dir():
        return False
    if (root / INDEX_NAME).is_file() or (root / "partial").is_dir():
        return True
    with contextlib.suppress(OSError), os.scandir(blocks) as entries:
        return any(BLOCK_FILE.fullmatch(entry.name) for entry in entries)
    return False


def make_private(path: Path) -> None:
    """Create a directory and its missing parents with mode 0700, regardless of the umask.

    `Path.mkdir(parents=True)` creates parents with the umask's mode: open to all users under umask 0.
    """
    for directory in (*reversed(path.parents), path):
        with contextlib.suppress(FileExistsError):
            if not os.path.lexists(directory):
                directory.mkdir(mode=0o700)


def _ensure_private(path: Path) -> None:
    """Create `path` if missing, and make it private to this user.

    Raises:
        CacheError: it is a link, belongs to another user, or is open to other users and contains other files.
    """
    make_private(path)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"{path} is a link or a special file; use the directory itself")
    if status.st_uid != os.geteuid():
        raise CacheError(f"{path} belongs to another user; use a directory of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        if all(entry.name in _OWN_NAMES or entry.name.startswith(INDEX_NAME) for entry in path.iterdir()):
            path.chmod(0o700)
            return
        # It contains files that are not a cache's: changing its mode could break other programs.
        raise CacheError(
            f"{path} is open to other users, and a cache holds people's prompts; "
            f"use an empty directory, or one that does not exist yet, or run: chmod 700 {path}"
        )


# --- block files -----------------------------------------------------------------------------


def is_gone(path: Path) -> bool:
    """Return whether there is no such file. False where the directory cannot be examined."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
