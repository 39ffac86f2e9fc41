"""Directories that are read and never written: a cache baked into a container image, or mounted read-only.

`ReadOnlyFileTier` serves what such a directory holds to any number of
processes. It takes no lock, makes no file and changes no row: blocks that turn
out to be damaged are hidden from this process alone. `is_read_only` says
whether a directory can only be used in this way.

SQLite needs care there. A database in WAL mode that has no log beside it is
opened as immutable, since SQLite would otherwise make one. Where there is a
log, a process that can write may be at work, or have died: the database is
opened read-only with its log and the shared memory as they are, or, where that
fails, as a private copy. Without a usable index the files themselves are read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from erllama._runtime.log import logger
from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.cache.texts.text_tokens import KnownText, TextDigests
from erllama.cache.tiers.directory import INDEX_NAME
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.index import SCHEMA_VERSION, FileStamp, Index, check_version, read_all
from erllama.cache.tiers.text_table import TextTable
from erllama.cache.tiers.tier import Changes, Problem, TierRow
from erllama.errors import CacheError, CacheFormatError

log = logger("erllama.cache")

_FIRST_READABLE = 3  # the schema since which rows are as they are now


def is_read_only(root: Path) -> bool:
    """Whether a directory holds a cache that this process can read and cannot write."""
    parts = [root, root / "blocks", *(root / name for name in (INDEX_NAME, "partial", "owners"))]
    if not parts[1].is_dir() or not os.access(parts[1], os.R_OK | os.X_OK):
        return False
    return any(path.exists() and not os.access(path, os.W_OK) for path in parts)


def file_tier(
    root: Path, budget: int, *, name: str = "disk", watch: bool = True, read_only: bool = False
) -> FileTier:
    """The tier for a directory: one that is only read where `read_only` is set or nothing else is possible."""
    if read_only or is_read_only(root):
        return ReadOnlyFileTier(root, budget, name=name)
    return FileTier(root, budget, name=name, watch=watch)


class ReadOnlyIndex(Index):
    """An index that is only read.

    Raises:
        CacheError: the database is of a newer release.
        sqlite3.Error: it cannot be read, or is of an early release.
    """

    def __init__(self, path: Path) -> None:  # does not call the other constructor, which writes
        self.path = path
        self._lock = threading.RLock()
        self._read_lock = threading.Lock()
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._signature = _signature(path)
        self._immutable = False
        try:
            self._reader = self._connected()
            version = check_version(path, self._reader)
            if version < _FIRST_READABLE:
                raise sqlite3.DatabaseError(f"{path} has version {version}")
            self._has_texts = version == SCHEMA_VERSION
            self._seen_version = self._data_version()
            self._first_rows: list[TierRow] | None
            self._seen, self._first_rows = read_all(self._reader)
        except BaseException:
            self.close()
            raise
        self.texts = TextTable(self._reader, self._read)
        self.inode = path.stat().st_ino

    def _connected(self) -> sqlite3.Connection:
        with_log = self._signature[1] is not None and self._signature[1].n_bytes > 0
        if not with_log:
            self._immutable = True
            return _connect_uri(self.path, "immutable=1")
        connection = _connect_uri(self.path, "mode=ro&readonly_shm=1")
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection
        except sqlite3.Error:
            connection.close()
        self._copy = tempfile.TemporaryDirectory(prefix="erllama-index-")
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{self.path}{suffix}", f"{self._copy.name}/{INDEX_NAME}{suffix}")
        return sqlite3.connect(f"{self._copy.name}/{INDEX_NAME}", check_same_thread=False, isolation_level=None)

    @property
    def outdated(self) -> bool:
        """Whether somebody wrote, and this object cannot see it."""
        return (self._immutable or self._copy is not None) and _signature(self.path) != self._signature

    def rows_now(self) -> list[TierRow]:
        with self._read_lock:
            return read_all(self._reader)[1]

    def fingerprint(self, identity: str) -> str | None:
        rows = self._read("SELECT sha256 FROM fingerprints WHERE identity = ?", [identity])
        return str(rows[0][0]) if rows else None

    def longest_text(self, digests: TextDigests, longer_than: int) -> KnownText | None:
        return self.texts.longest(digests, longer_than) if self._has_texts else None

    def close(self) -> None:
        with self._lock, self._read_lock:
            if hasattr(self, "_reader"):
                self._reader.close()
            if self._copy is not None:
                self._copy.cleanup()


class ReadOnlyFileTier(FileTier):
    """Blocks of a directory that is never written.

    Args:
        root: a directory with a cache.
        budget: kept for reports; a directory that is only read holds what it holds.
        name: as of `FileTier`.

    Raises (from `open`):
        CacheError: there is no cache, others may change it, or its index is of a newer release.
        OSError: it cannot be read.
    """

    read_only = True

    def __init__(self, root: Path, budget: int, *, name: str = "disk") -> None:
        super().__init__(root, budget, name=name, watch=False)
        self._frozen: ReadOnlyIndex | None = None
        self._opened = False
        self._rows_of_files: list[TierRow] = []
        self._hidden: set[bytes] = set()  # damaged: they stay where they are, and are not used again

    # --- opening and closing ---------------------------------------------------------------

    @property
    def usable(self) -> bool:
        return self._opened and not self._broken

    def open(self) -> None:
        self.close()
        _check_trustworthy(self.root)
        self._broken = False
        index = self.root / INDEX_NAME
        try:
            self._frozen = ReadOnlyIndex(index) if index.exists() else None
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            log.warning("%s cannot be read (%s); the files are read instead", index, error)
            self._frozen = None
        if self._frozen is None:
            self._rows_of_files = self._read_headers()
        self._opened = True
        log.info("%s is read-only: blocks are read from it, and none are saved there", self.root)

    def _read_headers(self) -> list[TierRow]:
        found = []
        for path in (self.root / "blocks").iterdir():
            with contextlib.suppress(CacheFormatError, OSError):
                block, _ = kvc.read_header(path)
                if path == self.path_of(block.key):
                    status = path.lstat()
                    found.append(TierRow(block, status.st_size, min(status.st_mtime_ns, time.time_ns())))
        return found

    def close(self) -> None:
        index, self._frozen = self._frozen, None
        self._opened = False
        self._rows_of_files = []
        if index is not None:
            index.close()

    abandon = close

    def forked(self) -> None:
        """Nothing is held that the parent's death should show."""

    # --- reading ---------------------------------------------------------------------------

    def rows(self) -> list[TierRow]:
        if not self.usable:
            raise CacheError(f"{self.root} is not open")
        rows = self._frozen.rows() if self._frozen is not None else self._rows_of_files
        return [row for row in rows if row.block.key not in self._hidden]

    def holds(self, key: bytes) -> bool:
        return any(row.block.key == key for row in self.rows())

    def changes(self) -> Changes | None:
        index = self._frozen
        if index is None or self._broken:
            return None
        if index.outdated or index.lost:
            self._broken = True  # it is opened anew, behind requests
            return None
        try:
            found = index.changes()
        except sqlite3.Error:
            self._broken = True
            raise
        if found is None:
            return None
        return found._replace(stored=[row for row in found.stored if row.block.key not in self._hidden])

    def fingerprint(self, identity: str) -> str | None:
        return self._frozen.fingerprint(identity) if self._frozen is not None else None

    def longest_text(self, digests: TextDigests, longer_than: int) -> KnownText | None:
        return self._frozen.longest_text(digests, longer_than) if self._frozen is not None else None

    def verify(self, on_read: Callable[[int], object] = lambda n_bytes: None) -> Iterator[Problem]:
        for row in self.rows():
            try:
                self.read(row.block)
            except (CacheFormatError, OSError) as error:
                yield Problem(self.name, self.where(row.block), str(error))
            on_read(row.n_bytes)

    def check(self) -> Iterator[Problem]:
        return iter(())  # files and index are as others left them, and nothing here counts them

    # --- what is not done ------------------------------------------------------------------

    def write(self, block: Block, payload: memoryview) -> None:
        raise CacheError(f"{self.root} is read-only; give a directory that can be written")

    def remove(self, keys: Sequence[bytes]) -> None:
        """Hide blocks from this process."""
        self._hidden.update(keys)

    def set_aside(self, block: Block) -> None:
        self.remove([block.key])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        """Uses are not noted."""

    def uses(self) -> list[tuple[bytes, int]]:
        return []

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    def reserve(self, block: Block, n_bytes: int) -> bool:
        return False

    def reserved(self) -> int:
        return 0

    def tidy(self) -> None:
        """Nothing is reserved."""

    def mend(self) -> None:
        """Nothing is put right."""

    def in_flight(self, key: bytes) -> bool:
        return False

    @property
    def shared(self) -> bool:
        return False


def _check_trustworthy(root: Path) -> None:
    """Refuse what is no cache, and what others may have put there: KV is believed as it is."""
    blocks = root / "blocks"
    if not blocks.is_dir():
        raise CacheError(f"{root} holds no cache to read; give the directory of one, or leave read_only out")
    frozen = bool(os.statvfs(root).f_flag & os.ST_RDONLY)
    for path in (root, blocks):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise CacheError(f"{path} is a link or a special file; give the directory itself")
        if found.st_uid not in (os.geteuid(), 0):
            raise CacheError(f"{path} belongs to another user; give a directory of your own, or of root")
        if not frozen and stat.S_IMODE(found.st_mode) & 0o022:
            raise CacheError(f"{path} can be written by other users; run: chmod go-w {path}")


_Stamp = tuple[FileStamp | None, FileStamp | None]


def _signature(path: Path) -> _Stamp:
    """What tells one state of a database and its log from another."""

    def stamp(of: str) -> FileStamp | None:
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(of)
            return FileStamp(found.st_size, found.st_mtime_ns)
        return None

    return stamp(str(path)), stamp(f"{path}-wal")


def _connect_uri(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?{options}", uri=True, timeout=0.0, check_same_thread=False, isolation_level=None
    )
