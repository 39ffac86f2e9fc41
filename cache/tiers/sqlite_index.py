"""Index of a cache directory: one SQLite database, the source of truth for the stored blocks.

Several processes share it (WAL). Each process writes through one connection, in short transactions, and reads what
others wrote through a second connection, which never waits. Triggers record every change of a block, so that a
process reads only the changes since its last read. `FileTier` owns an `Index` and calls it. A database that cannot
be read is moved aside and rebuilt from the files.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sqlite_utils

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block, SaveReason
from erllama.cache.blocks.keys import child_key
from erllama.cache.blocks.pins import PinRecord
from erllama.cache.tiers.index_schema import (
    SCHEMA_VERSION,
    DamagedIndexError,
    check_version,
    connect,
    create_tables,
    is_damaged,
    may_show_damage,
    primary_code,
    quarantine,
    retry_while_locked,
    shows_damage,
)
from erllama.cache.tiers.pin_table import PinTable
from erllama.cache.tiers.text_table import TextTable
from erllama.cache.tiers.tier import Changes, TierRow
from erllama.errors import CacheError

log = logger("erllama.cache")

_CHANGES_KEPT = 20_000  # a process that missed more reads everything
_TRIM_EVERY = 1_000  # blocks written between two removals of old changes
_COLUMNS = "b.key, parent, namespace, start, tokens, reason, recipe, slice_end, file_bytes, last_used"


class FileStamp(NamedTuple):
    """Size in bytes and mtime in ns of a file: different versions of a file have different stamps."""

    n_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Return the stamp of a file. Does not follow links.

        Raises:
            OSError: there is no file, or it cannot be examined.
        """
        status = path.lstat()
        return cls(status.st_size, status.st_mtime_ns)


class Index:
    """Database of one directory. Any thread may call the methods.

    Raises:
        CacheError: the database is of a newer release and stays untouched; or processes cannot share it.
        OSError, sqlite3.Error: the directory cannot hold a database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._in_transaction = False
        self._n_puts = 0
        self._read_lock = threading.Lock()
        try:
            retry_while_locked(self._open)
        except (OSError, CacheError):
            raise
        except sqlite3.Error as error:
            if not path.exists() or not (shows_damage(error) or (may_show_damage(error) and is_damaged(path))):
                raise
            quarantine(path, error)
            retry_while_locked(self._open)
        except (ValueError, TypeError, OverflowError) as error:  # unreadable content, as text that is not UTF-8
            quarantine(path, error)
            retry_while_locked(self._open)
        self.inode = path.stat().st_ino

    # --- opening ---------------------------------------------------------------------------

    def _open(self) -> None:
        with contextlib.ExitStack() as undo:
            existed = self.path.exists()
            connection = connect(self.path, wait=True)
            undo.callback(connection.close)
            if not existed:
                self.path.chmod(0o600)
            version = check_version(self.path, connection)
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                raise CacheError(
                    f"{self.path.parent} is on a file system that databases cannot share; use a local one"
                )
            connection.execute("PRAGMA synchronous=NORMAL")
            self.db = sqlite_utils.Database(connection, execute_plugins=False)
            if version < SCHEMA_VERSION:
                self._create(version)
            # Requests read through this connection, so it must not wait.
            self._reader = connect(self.path, wait=False)
            undo.callback(self._reader.close)
            self.texts = TextTable(connection, self._read)
            self.pins = PinTable(connection)
            self._last_data_version = self._data_version()
            # A database with damaged pages often still opens: read every block and pin, so that damage shows now.
            # Damage of a row of pins, which the files do not have, costs that pin alone.
            self._initial_rows: list[TierRow] | None
            self._last_change, self._initial_rows = read_blocks(self._reader)
            if damaged := self.pins.damaged(self._read_own):
                log.warning("%s: removed damaged rows of pins: %d", self.path, len(damaged))
                with self.transaction():
                    self.pins.remove_rows(damaged)
            undo.pop_all()

    def _create(self, version: int) -> None:
        with self.transaction():
            if version < 3:
                # The rows had another form. The files hold everything, and the rows are read again from them.
                self.db.execute("DROP TABLE IF EXISTS blocks")
            create_tables(self.db, version)
            self.db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    @property
    def is_replaced(self) -> bool:
        """Whether the directory no longer contains the open database."""
        try:
            return self.path.stat().st_ino != self.inode
        except (FileNotFoundError, NotADirectoryError):  # other errors do not prove it
            return True

    def close(self) -> None:
        with self._lock, self._read_lock:
            self.db.conn.close()
            self._reader.close()

    # --- reading ---------------------------------------------------------------------------

    def rows(self) -> list[TierRow]:
        """Return every stored block. The next call of `changes` returns what changed after this call.

        Raises:
            sqlite3.DatabaseError: the database is damaged, or a row is not as it was written.
        """
        with self._read_lock:
            rows, self._initial_rows = self._initial_rows, None
            if rows is None:
                self._last_change, rows = read_blocks(self._reader)
            return rows

    def peek_rows(self) -> list[TierRow]:
        """Return every stored block, without effect on `changes`."""
        with contextlib.closing(connect(self.path, wait=True)) as reader:
            return read_blocks(reader)[1]

    def stamps(self) -> dict[bytes, FileStamp]:
        """Return the recorded stamp of every block's file, by key."""
        with self._lock:
            found = self.db.execute("SELECT key, file_bytes, mtime_ns FROM blocks").fetchall()
        return {key: FileStamp(n_bytes, mtime_ns) for key, n_bytes, mtime_ns in found}

    def changes(self) -> Changes | None:
        """Return the changes of all processes since the last `rows` or `changes`; None if none. Never waits."""
        with self._read_lock:
            try:
                version = self._data_version()
                if version == self._last_data_version:
                    return None
                with _read_transaction(self._reader):
                    found = self._read_changes()
            except sqlite3.OperationalError as error:
                if primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    return None  # a process has locked the database; the next call reads the changes
                raise
            self._last_data_version = version
            return found

    def _read_changes(self) -> Changes:
        oldest = self._reader.execute("SELECT min(seq) FROM changes").fetchone()[0]
        if oldest is not None and oldest > self._last_change + 1:
            self._last_change, rows = _select_blocks(self._reader)
            return Changes(rows, [], complete=True)
        found = self._reader.execute(
            f"SELECT c.seq, c.key, {_COLUMNS} FROM changes c LEFT JOIN blocks b ON b.key = c.key "
            "WHERE c.seq > ? ORDER BY c.seq",
            [self._last_change],
        ).fetchall()
        if found:
            self._last_change = found[-1][0]
        stored = {row[1]: _check_row(*row[2:]) for row in found if row[2] is not None}
        removed = [key for _, key, *row in found if row[0] is None]
        return Changes(list(stored.values()), removed, complete=False)

    def stamp(self, key: bytes) -> FileStamp | None:
        """Return the recorded stamp of a block's file; None if the block is not stored."""
        with self._lock:
            row = self.db.execute("SELECT file_bytes, mtime_ns FROM blocks WHERE key = ?", [key]).fetchone()
        return FileStamp(*row) if row else None

    def writer_of(self, key: bytes) -> str | None:
        """Return the owner that is writing a block, as far as committed. Never waits."""
        with self._read_lock:
            row = self._reader.execute("SELECT owner FROM reservations WHERE key = ?", [key]).fetchone()
        return str(row[0]) if row else None

    def _read(self, query: str, values: list[Any]) -> list[tuple[Any, ...]]:
        """Run a query on committed rows; return no row while a process has locked the database. Never waits."""
        with self._read_lock:
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    return []
                raise

    def _data_version(self) -> int:
        return int(self._reader.execute("PRAGMA data_version").fetchone()[0])

    # --- writing ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all writes of the `with` block, or none if it raises. May be nested."""
        with self._lock:
            connection = self.db.conn
            if not self._in_transaction:
                with self.exclusive(), self.transaction():
                    yield
                return
            connection.execute("SAVEPOINT part")
            try:
                yield
            except BaseException:
                if connection.in_transaction:  # otherwise SQLite has rolled back by itself
                    connection.execute("ROLLBACK TO part")
                raise
            finally:
                if connection.in_transaction:
                    connection.execute("RELEASE part")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from writing. Commits even after an exception: removed files stay removed."""
        with self._lock:
            if self._in_transaction:
                yield
                return
            connection = self.db.conn
            _roll_back(connection)  # an earlier exception may have left a transaction open
            try:
                connection.execute("BEGIN IMMEDIATE")
                self._in_transaction = True
                try:
                    yield
                finally:
                    if connection.in_transaction:
                        connection.execute("COMMIT")
            finally:
                self._in_transaction = False
                _roll_back(connection)

    def put(self, block: Block, stamp: FileStamp, last_used: int, *, replace: bool = True) -> None:
        """Add a block. Where one of the same key is stored, replace it or, without `replace`, keep it."""
        with self.transaction():
            self._n_puts += 1
            if self._n_puts % _TRIM_EVERY == 1:
                self.trim_changes()
            self.db.table("blocks").insert(
                {
                    "key": block.key,
                    "parent": block.parent,
                    "namespace": block.namespace,
                    "start": block.start,
                    "tokens": block.tokens,
                    "reason": int(block.reason),
                    "recipe": block.recipe,
                    "slice_end": block.slice_end,
                    "file_bytes": stamp.n_bytes,
                    "mtime_ns": stamp.mtime_ns,
                    "last_used": last_used,
                },
                pk="key",
                replace=replace,
                ignore=not replace,
            )

    def remove(self, keys: Iterable[bytes]) -> None:
        with self.transaction():
            self.db.conn.executemany("DELETE FROM blocks WHERE key = ?", [(key,) for key in keys])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        """Record when blocks were last used: pairs of key and ns since 1970."""
        with self.transaction():
            self._clamp_uses()
            self.db.conn.executemany(
                "UPDATE blocks SET last_used = ?1 WHERE key = ?2 AND last_used < ?1",
                [(at, key) for key, at in used],
            )

    def uses_since(self, ns: int) -> list[tuple[bytes, int]]:
        """Return the blocks used at or after `ns`, in ns since 1970, and when they were used."""
        with self.transaction():
            self._clamp_uses()
            return self.db.execute("SELECT key, last_used FROM blocks WHERE last_used >= ?", [ns]).fetchall()

    def _clamp_uses(self) -> None:
        """Set uses in the future to now. A clock that was ahead recorded them, and they would rank as newest."""
        now = time.time_ns()
        self.db.execute("UPDATE blocks SET last_used = ?1 WHERE last_used > ?1", [now])

    def trim_changes(self) -> None:
        """Delete old changes."""
        with self.transaction():
            self.db.execute("DELETE FROM changes WHERE seq <= (SELECT max(seq) FROM changes) - ?", [_CHANGES_KEPT])

    # --- reservations ------------------------------------------------------------------------

    def reservations(self) -> dict[bytes, tuple[str, int]]:
        """Return owner and bytes of every block that is being written, by key."""
        with self._lock:
            found = self.db.execute("SELECT key, owner, n_bytes FROM reservations").fetchall()
        return {key: (owner, n_bytes) for key, owner, n_bytes in found}

    def reserve(self, key: bytes, owner: str, n_bytes: int) -> None:
        with self.transaction():
            self.db.table("reservations").insert(
                {"key": key, "owner": owner, "n_bytes": n_bytes}, pk="key", replace=True
            )

    def reserved_by(self, key: bytes) -> str | None:
        with self._lock:
            row = self.db.execute("SELECT owner FROM reservations WHERE key = ?", [key]).fetchone()
        return str(row[0]) if row else None

    def release(self, key: bytes, owner: str) -> None:
        with self.transaction():
            self.db.execute("DELETE FROM reservations WHERE key = ? AND owner = ?", [key, owner])

    def release_all(self, owners: Iterable[str]) -> None:
        """Delete all reservations of these owners."""
        with self.transaction():
            self.db.conn.executemany("DELETE FROM reservations WHERE owner = ?", [(owner,) for owner in owners])

    # --- pins --------------------------------------------------------------------------------

    def changed_pins(self) -> list[PinRecord] | None:
        """Return all pins; None if there was no change since the last call. Never waits.

        Within `exclusive`, the result is up to date. Otherwise, it may lack the latest changes.
        """
        if not self._lock.acquire(blocking=False):
            return self.pins.changed(self._read)
        try:
            return self.pins.changed(self._read_own if self._in_transaction else self._read)
        finally:
            self._lock.release()

    def all_pins(self) -> list[PinRecord]:
        """Return all pins, expired ones included."""
        with self._lock:
            return self.pins.all(self._read_own)

    def _read_own(self, query: str, values: list[Any]) -> list[tuple[Any, ...]]:
        """Run a query on the connection for writes, whose lock the caller holds."""
        return self.db.execute(query, values).fetchall()

    # --- fingerprints ------------------------------------------------------------------------

    def fingerprint(self, identity: str) -> str | None:
        """Return the digest stored for a file's identity; None if the index has no digest of it."""
        with self._lock:
            row = self.db.execute("SELECT sha256 FROM fingerprints WHERE identity = ?", [identity]).fetchone()
        return str(row[0]) if row else None

    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        with self.transaction():
            self.db.table("fingerprints").insert(
                {"identity": identity, "sha256": sha256}, pk="identity", replace=True
            )


def _roll_back(connection: sqlite3.Connection) -> None:
    """End an open transaction, if any: other processes wait for it."""
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def _read_transaction(reader: sqlite3.Connection) -> Iterator[None]:
    """Make all reads in the `with` block see one snapshot."""
    _roll_back(reader)
    try:
        reader.execute("BEGIN")
        yield
    finally:
        _roll_back(reader)


def read_blocks(reader: sqlite3.Connection) -> tuple[int, list[TierRow]]:
    """Return the number of the last change, and every block as of that change."""
    with _read_transaction(reader):
        return _select_blocks(reader)


def _select_blocks(reader: sqlite3.Connection) -> tuple[int, list[TierRow]]:
    try:
        last_change = reader.execute("SELECT coalesce(max(seq), 0) FROM changes").fetchone()[0]
        found = reader.execute(f"SELECT {_COLUMNS} FROM blocks b").fetchall()
    except UnicodeDecodeError as error:
        raise DamagedIndexError(str(error)) from error
    return last_change, [_check_row(*row) for row in found]


def _check_row(
    key: bytes,
    parent: bytes,
    namespace: bytes,
    start: int,
    tokens: bytes,
    reason: int,
    recipe: bytes,
    slice_end: int,
    file_bytes: int,
    last_used: int,
) -> TierRow:
    try:
        block = Block(key, parent, namespace, start, tokens, SaveReason(reason), recipe, slice_end)
        sound = child_key(parent, tokens) == key and min(start, slice_end, file_bytes, last_used) >= 0
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise DamagedIndexError("a row of the index contradicts itself")
    return TierRow(block, file_bytes, min(last_used, time.time_ns()))  # a clock may have been ahead
