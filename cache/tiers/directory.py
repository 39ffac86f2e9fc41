"""A cache directory as the file system sees it: private, ours, and shared by processes that can tell who lives.

    <root>/index.db       what is stored
    <root>/blocks/        one file a block, named by its key
    <root>/partial/       files being written
    <root>/owners/        one locked file for every process that has the directory open
    <root>/damaged/       the last few files that were not what they should be

A process that has the directory open holds a lock on a file of its own. The
system lets go of the lock when the process ends, however it ends: so a lock
that can be had belongs to nobody, and what its owner left half-done is waste.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from erllama._runtime.log import logger
from erllama.cache.blocks import kvc
from erllama.cache.blocks.keys import KEY_BYTES
from erllama.errors import CacheError

log = logger("erllama.cache")

INDEX_NAME = "index.db"
BLOCK_FILE = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}{re.escape(kvc.SUFFIX)}")  # the key in hex
# What a directory may hold and still be ours to close: a cache, or what else the user's cache directory has.
_OURS = {"blocks", "partial", "owners", "damaged", "llama", "models"}
_DAMAGED_KEPT = 8  # enough to see what happened; they are outside every budget
_LOCK = ".lock"
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "fuse.sshfs", "webdav"}


class CacheDirectory:
    """One process's hold on a cache directory.

    Raises (from the constructor):
        CacheError: it is not private to us, is a link, lies in another cache, or cannot be locked.
        OSError: it cannot be made or used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = root / INDEX_NAME
        self.blocks = root / "blocks"
        self.partial = root / "partial"
        self.owners = root / "owners"
        self.damaged = root / "damaged"
        _refuse_nested(root)
        for directory in (root, self.blocks, self.partial, self.owners, self.damaged):
            _private_directory(directory)
        self._serial = itertools.count()
        self._process = os.getpid()
        self.owner, self._lock = self._take_lock()

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            self.leave()
        else:
            self.close()

    def close(self) -> None:
        """Let go of the lock. Idempotent; a forked child may call it without harm to its parent."""
        # The lock is the parent's until it lets go itself; what a child closes is its own descriptor.
        lock, self._lock = getattr(self, "_lock", -1), -1
        if lock >= 0:
            with contextlib.suppress(OSError):
                os.close(lock)

    def leave(self) -> None:
        """Let go, and leave no trace of having been here."""
        if getattr(self, "_lock", -1) >= 0:
            with contextlib.suppress(OSError):
                (self.owners / f"{self.owner}{_LOCK}").unlink()
        self.close()

    @property
    def whole(self) -> bool:
        """Whether nobody has taken parts of it away.

        Raises:
            OSError: that cannot be found out now.
        """
        try:
            mine = (self.owners / f"{self.owner}{_LOCK}").stat().st_ino == os.fstat(self._lock).st_ino
            return mine and all(stat.S_ISDIR(path.stat().st_mode) for path in (self.blocks, self.partial))
        except (FileNotFoundError, NotADirectoryError):  # another error is no evidence
            return False

    def new_partial(self) -> Path:
        return self.partial / f"{self.owner}-{next(self._serial)}{kvc.SUFFIX}"

    def block_files(self) -> Iterator[os.DirEntry[str]]:
        """Whatever lies where blocks should."""
        with os.scandir(self.blocks) as entries:
            yield from entries

    def set_aside(self, path: Path) -> None:
        """Move a file to `damaged/`, kept for a look at what happened."""
        path.rename(self.damaged / f"{time.time_ns()}-{path.name}")
        for old in sorted(self.damaged.iterdir())[:-_DAMAGED_KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()

    # --- who lives

    def others(self) -> bool:
        """Whether another process, or another cache of this one, has the directory open."""
        return any(owner != self.owner and self.alive(owner) for owner in self._owners())

    def alive(self, owner: str) -> bool:
        """Whether the process that calls itself `owner` still has the directory open.

        Only a lock file that is gone, or a lock that can be had, is evidence that it has not. Where this
        process cannot look, for want of descriptors or for another reason, the owner is taken to live.
        """
        if owner == self.owner:
            return True
        try:
            lock = os.open(self.owners / f"{owner}{_LOCK}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
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
        """Who is writing a file in `partial/`."""
        return partial.name.split("-", 1)[0]

    def reap(self) -> None:
        """Remove what dead processes left: their files first, then the lock that tells of them."""
        self.reap_files()
        for owner in self._owners():
            self._bury(owner)

    def reap_files(self) -> None:
        """Remove the files that dead processes left."""
        for path in self.partial.iterdir():
            if not self.alive(self.owner_of(path)):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _bury(self, owner: str) -> None:
        """Remove a dead one's lock file, while holding its lock: nobody who takes it meanwhile is robbed."""
        path = self.owners / f"{owner}{_LOCK}"
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(lock)

    def _owners(self) -> list[str]:
        return [name.removesuffix(_LOCK) for name in os.listdir(self.owners) if name.endswith(_LOCK)]

    def _take_lock(self) -> tuple[str, int]:
        while True:
            owner = secrets.token_hex(8)
            path = self.owners / f"{owner}{_LOCK}"
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._check_locks(path)
            except (BlockingIOError, FileNotFoundError):
                os.close(lock)  # somebody who reaps just now took it for a dead one's
                continue
            except OSError as error:
                os.close(lock)
                path.unlink(missing_ok=True)
                raise CacheError(
                    f"{self.root} is on a file system without locks ({error}); "
                    "several processes could not share it: give a directory on a local disk"
                ) from error
            except BaseException:
                os.close(lock)
                path.unlink(missing_ok=True)
                raise
            with contextlib.suppress(OSError):
                if path.stat().st_ino == os.fstat(lock).st_ino:
                    return owner, lock
            os.close(lock)  # reaped between open and lock

    def _check_locks(self, path: Path) -> None:
        """Some network file systems grant every lock to everyone."""
        second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        finally:
            os.close(second)
        raise CacheError(
            f"{self.root} is on a file system whose locks do not hold; give a directory on a local disk"
        )


def warn_of_file_system(root: Path, in_memory: bool) -> None:
    """Log what a user should know of the file system that `root` is on."""
    kind = file_system(root)
    if in_memory and kind and kind not in _MEMORY_FILE_SYSTEMS:
        log.warning("ram_file=%s is on %s, not in memory; give a directory on a tmpfs", root, kind)
    if kind in _NETWORK_FILE_SYSTEMS:
        log.warning("%s is on %s; only processes of one machine may share it", root, kind)


def file_system(path: Path) -> str:
    """The kind of the file system that a path is on, as "ext4"; empty where that is not known."""
    try:
        mounts = [(m.mountpoint, m.fstype) for m in psutil.disk_partitions(all=True)]
    except (OSError, RuntimeError):
        return ""
    real = os.path.realpath(path)
    # The longest mount point that contains it; of several on one point, the last.
    best = ("", "")
    for point, kind in mounts:
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _refuse_nested(root: Path) -> None:
    for above in root.parents:
        if is_cache(above):
            raise CacheError(f"{root} lies in the cache directory {above}; give a directory of its own, or {above}")
    if root.is_dir() and not is_cache(root):
        for below in root.iterdir():
            if below.is_dir() and is_cache(below):
                raise CacheError(f"{root} holds the cache directory {below}; give another directory, or {below}")


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
    """Make a directory, and those above it that are missing, for its owner alone, whatever the umask.

    `Path.mkdir(parents=True)` makes parents with the umask's mode: open to everybody under umask 0.
    """
    for directory in (*reversed(path.parents), path):
        with contextlib.suppress(FileExistsError):
            if not os.path.lexists(directory):
                directory.mkdir(mode=0o700)


def _private_directory(path: Path) -> None:
    """Make `path` a directory that nobody else may look into, or refuse one that is not."""
    make_private(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"{path} is a link or a special file; give the directory itself")
    if found.st_uid != os.geteuid():
        raise CacheError(f"{path} belongs to another user; give a directory of your own")
    if stat.S_IMODE(found.st_mode) & 0o077:
        if all(entry.name in _OURS or entry.name.startswith(INDEX_NAME) for entry in path.iterdir()):
            path.chmod(0o700)
            return
        # Others' things are in it: it is not ours to close.
        raise CacheError(
            f"{path} is open to other users, and a cache holds people's prompts; "
            f"give an empty directory, or one that does not exist yet, or run: chmod 700 {path}"
        )
