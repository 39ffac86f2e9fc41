"""Read-only cache directories: a cache in a container image, or on a file system mounted read-only.

`ReadOnlyFileTier` serves the blocks of such a directory to any number of processes. It takes no lock, creates no
file and changes no row. It hides damaged blocks from its own process only. `create_file_tier` chooses between it
and `FileTier`.

SQLite needs care there. A database in WAL mode without a log beside it is opened as immutable, because SQLite would
otherwise create a log. If there is a log, a process that can write may be running, or may have crashed. The
database is then opened read-only with its log and the shared memory as they are, or, if that fails, as a private
copy. Without a usable index, the tier reads the files themselves.
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
from erllama.cache.blocks.encryption import Encryption
from erllama.cache.blocks.pins import PinRecord
from erllama.cache.texts.text_tokens import TextDigests, TextRecord
from erllama.cache.tiers.file_names import INDEX_NAME, block_name
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.index_schema import TEXTS_SINCE, check_version
from erllama.cache.tiers.key_state import restrict, state_of_files
from erllama.cache.tiers.row_codec import BLOCK, RowCodec
from erllama.cache.tiers.sqlite_index import FileStamp, Index
from erllama.cache.tiers.text_table import TextTable
from erllama.cache.tiers.tier import Changes, Problem, TierRow
from erllama.errors import CacheError, CacheFormatError, CacheKeyError

log = logger("erllama.cache")

_FIRST_READABLE = 3  # the oldest schema version whose rows have today's columns


def is_read_only(root: Path) -> bool:
    """Return whether this process can read the cache in a directory but cannot write to it."""
    parts = [root, root / "blocks", *(root / name for name in (INDEX_NAME, "partial", "owners"))]
    if not parts[1].is_dir() or not os.access(parts[1], os.R_OK | os.X_OK):
        return False
    return any(path.exists() and not os.access(path, os.W_OK) for path in parts)


def create_file_tier(
    root: Path,
    budget: int,
    *,
    name: str = "disk",
    watch: bool = True,
    read_only: bool = False,
    key_file: Path | None = None,
) -> FileTier:
    """Return the tier for a directory: a read-only one if `read_only` is set or the directory is not writable."""
    if read_only or is_read_only(root):
        return ReadOnlyFileTier(root, budget, name=name, key_file=key_file)
    return FileTier(root, budget, name=name, watch=watch, key_file=key_file)


class ReadOnlyIndex(Index):
    """An index that is never written.

    Raises:
        CacheError: the database is of a newer release.
        CacheKeyError: as of `Index`.
        sqlite3.Error: the database cannot be read, or is of a release before version 3.
    """

    # does not call super().__init__(), which writes
    def __init__(self, path: Path, encryption: Encryption | None = None) -> None:
        self.path = path
        self._all_keys = encryption
        self.codec, self._keys = RowCodec(), None
        self._lock = threading.RLock()
        self._read_lock = threading.Lock()
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._state = _state_of(path)
        self._immutable = False
        try:
            self._reader = self._connect()
            version = check_version(path, self._reader)
            if version < _FIRST_READABLE:
                raise sqlite3.DatabaseError(f"{path} has version {version}")
            self._has_texts = version >= TEXTS_SINCE
            self._use_keys(self._reader)
            self._last_data_version = self._data_version()
            self._initial_rows: list[TierRow] | None
            self._last_change, self._initial_rows = self._read_blocks(self._reader)
        except BaseException:
            self.close()
            raise
        self.texts = TextTable(self._reader, self._read, self.codec)
        self.inode = path.stat().st_ino

    def _connect(self) -> sqlite3.Connection:
        with_log = self._state[1] is not None and self._state[1].n_bytes > 0
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
        """Whether another process wrote to the database, and this object cannot read that."""
        return (self._immutable or self._copy is not None) and _state_of(self.path) != self._state

    def peek_rows(self) -> list[TierRow]:
        with self._read_lock:
            return self._read_blocks(self._reader)[1]

    def fingerprint(self, identity: str) -> str | None:
        rows = self._read("SELECT sha256 FROM fingerprints WHERE identity = ?", [identity])
        return str(rows[0][0]) if rows else None

    def longest_text(self, digests: TextDigests, longer_than: int) -> TextRecord | None:
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
        budget: shown in reports only. The tier does not evict.
        name: as of `FileTier`.

    Raises (from `open`):
        CacheError: there is no cache, other users may change it, or its index is of a newer release.
        CacheKeyError: the key is missing or wrong, or the directory is not encrypted.
        OSError: it cannot be read.
    """

    read_only = True

    def __init__(self, root: Path, budget: int, *, name: str = "disk", key_file: Path | None = None) -> None:
        super().__init__(root, budget, name=name, watch=False, key_file=key_file)
        self._index: ReadOnlyIndex | None = None
        self._is_open = False
        self._is_outdated = False  # another process changed the index, and `open` must read it again
        self._header_rows: list[TierRow] = []  # read from the files, where no index is usable
        self._hidden: set[bytes] = set()  # keys of damaged blocks, which stay where they are

    # --- opening and closing ---------------------------------------------------------------

    @property
    def usable(self) -> bool:
        return self._is_open and not self._is_outdated

    def open(self) -> None:
        self.close()
        _check_trustworthy(self.root)
        self._is_outdated = False
        path = self.root / INDEX_NAME
        encryption = self._keys_of_file()
        try:
            self._index = ReadOnlyIndex(path, encryption) if path.exists() else None
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            log.warning("%s cannot be read (%s); reading the files instead", path, error)
            self._index = None
        if self._index is None:
            keys = state_of_files(self.root, encryption)
            self._encryption = encryption
            if encryption is not None and keys is not None:
                self._encryption = restrict(encryption, keys, self.root)
            self._header_rows = self._read_headers()
        else:
            self._encryption = self._index.encryption
        self._is_open = True
        log.info("%s is read-only: blocks are read from it but not saved to it", self.root)

    def _read_headers(self) -> list[TierRow]:
        found = []
        for path in (self.root / "blocks").iterdir():
            with contextlib.suppress(CacheFormatError, CacheKeyError, OSError):
                name, content_key = block_name(path.name), None
                if self._encryption is not None and name is not None:
                    known = self._encryption.find(name, BLOCK)
                    content_key = None if known is None else known[1]
                block, _ = kvc.read_header(path, content_key)
                if any(path == place.path for place in self._places(block.key)):
                    status = path.lstat()
                    found.append(TierRow(block, status.st_size, min(status.st_mtime_ns, time.time_ns())))
        return found

    def close(self) -> None:
        index, self._index = self._index, None
        self._is_open = False
        self._header_rows = []
        if index is not None:
            index.close()

    abandon = close

    def forked(self) -> None:
        """Do nothing: the tier holds no lock."""

    # --- reading ---------------------------------------------------------------------------

    def rows(self) -> list[TierRow]:
        if not self.usable:
            raise CacheError(f"{self.root} is not open")
        rows = self._index.rows() if self._index is not None else self._header_rows
        return [row for row in rows if row.block.key not in self._hidden]

    def holds(self, key: bytes) -> bool:
        return any(row.block.key == key for row in self.rows())

    def changes(self) -> Changes | None:
        index = self._index
        if index is None or self._is_outdated:
            return None
        if index.outdated or index.is_replaced:
            self._is_outdated = True  # the cache opens it again in the background
            return None
        try:
            found = index.changes()
        except (CacheKeyError, sqlite3.Error):
            self._is_outdated = True
            raise
        if found is None:
            return None
        return found._replace(stored=[row for row in found.stored if row.block.key not in self._hidden])

    def fingerprint(self, identity: str) -> str | None:
        return self._index.fingerprint(identity) if self._index is not None else None

    def longest_text(self, digests: TextDigests, longer_than: int) -> TextRecord | None:
        return self._index.longest_text(digests, longer_than) if self._index is not None else None

    def pins(self) -> list[PinRecord]:
        return []  # no block of the directory is evicted

    def changed_pins(self) -> None:
        return None

    def verify(self, on_read: Callable[[int], object] = lambda n_bytes: None) -> Iterator[Problem]:
        for row in self.rows():
            try:
                self.read(row.block)
            except (CacheFormatError, OSError) as error:
                yield Problem(self.name, self.location_of(row.block), str(error))
            on_read(row.n_bytes)

    def check(self) -> Iterator[Problem]:
        return iter(())  # no budget of this process counts these files

    # --- calls without effect, or refused --------------------------------------------------

    def write(self, block: Block, payload: memoryview) -> None:
        raise CacheError(f"{self.root} is read-only; use a writable directory")

    def put_pin(self, pin: PinRecord) -> None:
        raise CacheError(f"{self.root} is read-only; use a writable directory")

    def remove_pin(self, name: str) -> bool:
        return False

    def remove(self, keys: Sequence[bytes]) -> None:
        """Hide blocks from this process."""
        self._hidden.update(keys)

    def quarantine(self, block: Block) -> None:
        self.remove([block.key])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        """Do nothing: uses are not recorded."""

    def uses(self) -> list[tuple[bytes, int]]:
        return []

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    def reserve(self, block: Block, n_bytes: int) -> bool:
        return False

    def reserved(self) -> int:
        return 0

    def release_stale_reservations(self) -> None:
        """Do nothing: the tier has no reservations."""

    def repair(self) -> None:
        """Do nothing: the directory is not changed."""

    def in_flight(self, key: bytes) -> bool:
        return False

    def sharers(self) -> set[str]:
        return set()


def _check_trustworthy(root: Path) -> None:
    """Raise CacheError if `root` is not a cache, or other users can write to it: forged KV would not be noticed."""
    blocks = root / "blocks"
    if not blocks.is_dir():
        raise CacheError(f"{root} holds no cache to read; use the directory of one, or leave read_only out")
    mounted_read_only = bool(os.statvfs(root).f_flag & os.ST_RDONLY)
    for path in (root, blocks):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise CacheError(f"{path} is a link or a special file; use the directory itself")
        if status.st_uid not in (os.geteuid(), 0):
            raise CacheError(f"{path} belongs to another user; use a directory of your own, or of root")
        if not mounted_read_only and stat.S_IMODE(status.st_mode) & 0o022:
            raise CacheError(f"{path} can be written by other users; run: chmod go-w {path}")


_State = tuple[FileStamp | None, FileStamp | None]


def _state_of(path: Path) -> _State:
    """Return the stamps of a database and of its log. Both are equal if neither was changed."""

    def stamp(of: str) -> FileStamp | None:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(of)
            return FileStamp(status.st_size, status.st_mtime_ns)
        return None

    return stamp(str(path)), stamp(f"{path}-wal")


def _connect_uri(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?{options}", uri=True, timeout=0.0, check_same_thread=False, isolation_level=None
    )
