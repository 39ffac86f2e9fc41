"""Index of a cache directory: one SQLite database, the source of truth for the stored blocks.

Several processes share it (WAL). Each process writes through one connection, in short transactions, and reads what
others wrote through a second connection, which never waits. Triggers record every change of a block, so that a
process reads only the changes since its last read. `FileTier` owns an `Index` and calls it. A database that cannot
be read is moved aside and rebuilt from the files. With a key, a `RowCodec` encrypts the rows; `key_state` keeps
processes with other keys apart.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlite_utils

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.encryption import ContentKey, Encryption
from erllama.cache.blocks.pins import PinRecord
from erllama.cache.tiers.index_schema import (
    ENCRYPTED_VERSION,
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
from erllama.cache.tiers.key_state import KeyState, check_kind, read_state, restrict, state_of_files, write_state
from erllama.cache.tiers.pin_table import PinTable
from erllama.cache.tiers.row_codec import BLOCK, BlockColumns, RowCodec, codec_of
from erllama.cache.tiers.text_table import TextTable
from erllama.cache.tiers.tier import Changes, TierRow
from erllama.errors import CacheError, CacheKeyError

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

    Args:
        encryption: the keys that rows and files are, or will be, encrypted with; None for no encryption.

    Raises:
        CacheError: the database is of a newer release and stays untouched; or processes cannot share it.
        CacheKeyError: the directory is encrypted with another key, or without one, or the key is missing.
        OSError, sqlite3.Error: the directory cannot hold a database.
    """

    codec: RowCodec
    _keys: KeyState | None

    def __init__(self, path: Path, encryption: Encryption | None = None) -> None:
        self.path = path
        self._all_keys = encryption
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
            if version:
                check_kind(self.path.parent, is_encrypted=version == ENCRYPTED_VERSION, encryption=self._all_keys)
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                raise CacheError(
                    f"{self.path.parent} is on a file system that databases cannot share; use a local one"
                )
            connection.execute("PRAGMA synchronous=NORMAL")
            self.db = sqlite_utils.Database(connection, execute_plugins=False)
            self.codec, self._keys = RowCodec(), None
            if version < SCHEMA_VERSION:
                self._create()
            # Requests read through this connection, so it must not wait.
            self._reader = connect(self.path, wait=False)
            undo.callback(self._reader.close)
            self._use_keys(connection)
            self.texts = TextTable(connection, self._read, self.codec)
            self.pins = PinTable(connection, self.codec)
            self._last_data_version = self._data_version()
            # A database with damaged pages often still opens: read every block and pin, so that damage shows now.
            # Damage of a row of pins, which the files do not have, costs that pin alone.
            self._initial_rows: list[TierRow] | None
            self._last_change, self._initial_rows = self._read_blocks(self._reader)
            if damaged := self.pins.damaged(self._read_own):
                log.warning("%s: removed damaged rows of pins: %d", self.path, len(damaged))
                with self.transaction():
                    self.pins.remove_rows(damaged)
            undo.pop_all()

    def _create(self) -> None:
        with self.transaction():
            version = check_version(self.path, self.db.conn)  # another process may have created it meanwhile
            if version >= SCHEMA_VERSION:
                return
            keys = None if version else state_of_files(self.path.parent, self._all_keys)
            if version < 3:
                # The rows had another form. The files hold everything, and the rows are read again from them.
                self.db.execute("DROP TABLE IF EXISTS blocks")
            create_tables(self.db, version, encrypted=keys is not None)
            if keys is not None:
                write_state(self.db.conn, keys)
            self.db.execute(f"PRAGMA user_version={SCHEMA_VERSION if keys is None else ENCRYPTED_VERSION}")

    # --- keys ------------------------------------------------------------------------------

    @property
    def encryption(self) -> Encryption | None:
        """The keys in use; None if the directory is not encrypted."""
        return self.codec.encryption

    @property
    def keys(self) -> KeyState | None:
        """The ids of the keys in use, as this object uses them; None if the directory is not encrypted."""
        return self._keys

    def _use_keys(self, connection: sqlite3.Connection) -> None:
        """Use the keys of the database."""
        is_encrypted = check_version(self.path, connection) == ENCRYPTED_VERSION
        check_kind(self.path.parent, is_encrypted=is_encrypted, encryption=self._all_keys)
        if self._all_keys is not None:
            self._keys = read_state(connection)
            self.codec = codec_of(restrict(self._all_keys, self._keys, self.path.parent))

    def set_keys(self, keys: KeyState) -> None:
        """Change which keys are in use, within a transaction. The caller changes the rows.

        Raises:
            CacheKeyError: one of them is not in the key file.
        """
        if self._all_keys is None:
            raise CacheKeyError(f"{self.path.parent} is not encrypted, so it has no keys")
        codec = codec_of(restrict(self._all_keys, keys, self.path.parent))
        write_state(self.db.conn, keys)
        self._keys, self.codec = keys, codec
        self.texts = TextTable(self.db.conn, self._read, codec)
        self.pins = PinTable(self.db.conn, codec)

    def _check_keys(self, connection: sqlite3.Connection) -> None:
        """Check, within a transaction, that the keys in use are those of this object.

        Raises:
            CacheKeyError: another process has rotated the keys.
        """
        if self._keys is not None and read_state(connection) != self._keys:
            raise CacheKeyError(f"the keys of {self.path.parent} were rotated; the cache opens it again")

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
                self._last_change, rows = self._read_blocks(self._reader)
            return rows

    def _read_blocks(self, reader: sqlite3.Connection) -> tuple[int, list[TierRow]]:
        """Return the number of the last change, and every block as of that change."""
        with _read_transaction(reader):
            return self._select_blocks(reader)

    def _select_blocks(self, reader: sqlite3.Connection) -> tuple[int, list[TierRow]]:
        self._check_keys(reader)
        try:
            last_change = reader.execute("SELECT coalesce(max(seq), 0) FROM changes").fetchone()[0]
            found = reader.execute(f"SELECT {_COLUMNS} FROM blocks b").fetchall()
        except UnicodeDecodeError as error:
            raise DamagedIndexError(str(error)) from error
        return last_change, [self._row(row) for row in found]

    def _row(self, columns: Sequence[Any]) -> TierRow:
        *of_block, file_bytes, last_used = columns
        try:
            block = self.codec.decode_block(BlockColumns(*of_block))
            sound = min(file_bytes, last_used) >= 0
        except (TypeError, ValueError, CacheError):
            sound = False
        if not sound:
            raise DamagedIndexError("a row of the index contradicts itself")
        return TierRow(block, file_bytes, min(last_used, time.time_ns()))  # a clock may have been ahead

    def peek_rows(self) -> list[TierRow]:
        """Return every stored block, without effect on `changes`."""
        with contextlib.closing(connect(self.path, wait=True)) as reader:
            return self._read_blocks(reader)[1]

    def stamps(self) -> dict[bytes, FileStamp]:
        """Return the recorded stamp of every block's file, by the name of the file."""
        with self._lock:
            found = self.db.execute("SELECT key, file_bytes, mtime_ns FROM blocks").fetchall()
        return {name: FileStamp(n_bytes, mtime_ns) for name, n_bytes, mtime_ns in found}

    def changes(self) -> Changes | None:
        """Return the changes of all processes since the last `rows` or `changes`; None if none. Never waits."""
        with self._read_lock:
            try:
                version = self._data_version()
                if version == self._last_data_version:
                    return None
                with _read_transaction(self._reader):
                    self._check_keys(self._reader)
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
            self._last_change, rows = self._select_blocks(self._reader)
            return Changes(rows, [], complete=True)
        found = self._reader.execute(
            f"SELECT c.seq, c.key, {_COLUMNS} FROM changes c LEFT JOIN blocks b ON b.key = c.key "
            "WHERE c.seq > ? ORDER BY c.seq",
            [self._last_change],
        ).fetchall()
        if found:
            self._last_change = found[-1][0]
        stored = [self._row(row) for row in {row[1]: row[2:] for row in found if row[2] is not None}.values()]
        there = {row.block.key for row in stored}  # under the new key, if its row under the old one was removed
        keys = [self.codec.value_of(name, BLOCK) for _, name, *row in found if row[0] is None]
        return Changes(stored, [key for key in keys if key is not None and key not in there], complete=False)

    def stamp(self, key: bytes) -> FileStamp | None:
        """Return the recorded stamp of a block's file; None if the block is not stored."""
        name = self.listed_name(key)
        return None if name is None else self.stamp_of(name)

    def listed_name(self, key: bytes) -> bytes | None:
        """Return the name of the file of a stored block; None if the block is not stored."""
        return next((name for name in self.codec.names(key, BLOCK) if self.stamp_of(name) is not None), None)

    def stamp_of(self, name: bytes) -> FileStamp | None:
        """Return the recorded stamp of the file with a name; None if no block has it."""
        with self._lock:
            row = self.db.execute("SELECT file_bytes, mtime_ns FROM blocks WHERE key = ?", [name]).fetchone()
        return FileStamp(*row) if row else None

    def writer_of(self, key: bytes) -> str | None:
        """Return the owner that is writing a block, as far as committed. Never waits."""
        with self._read_lock:
            return self._owner(self._reader, key)

    def _owner(self, connection: sqlite3.Connection, key: bytes) -> str | None:
        for name in self.codec.names(key, BLOCK):
            row = connection.execute("SELECT owner FROM reservations WHERE key = ?", [name]).fetchone()
            if row:
                return str(row[0])
        return None

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
                self._check_keys(connection)
                try:
                    yield
                finally:
                    if connection.in_transaction:
                        connection.execute("COMMIT")
            finally:
                self._in_transaction = False
                _roll_back(connection)

    def put(self, block: Block, stamp: FileStamp, last_used: int, content_key: ContentKey | None = None) -> None:
        """Add a block, or replace one of the same key.

        Args:
            content_key: the key that its file is encrypted with; None for the current one.
        """
        with self.transaction():
            self._n_puts += 1
            if self._n_puts % _TRIM_EVERY == 1:
                self.trim_changes()
            columns = self.codec.encode_block(block, content_key)
            stamps = {"file_bytes": stamp.n_bytes, "mtime_ns": stamp.mtime_ns, "last_used": last_used}
            self.db.table("blocks").insert({**columns._asdict(), **stamps}, pk="key", replace=True)

    def remove(self, keys: Iterable[bytes]) -> None:
        """Remove the rows of blocks."""
        self.remove_names(name for key in keys for name in self.codec.names(key, BLOCK))

    def remove_names(self, names: Iterable[bytes]) -> None:
        """Remove the rows of files by their names."""
        with self.transaction():
            self.db.conn.executemany("DELETE FROM blocks WHERE key = ?", [(name,) for name in names])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        """Record when blocks were last used: pairs of key and ns since 1970."""
        with self.transaction():
            self._clamp_uses()
            self.db.conn.executemany(
                "UPDATE blocks SET last_used = ?1 WHERE key = ?2 AND last_used < ?1",
                [(at, name) for key, at in used for name in self.codec.names(key, BLOCK)],
            )

    def uses_since(self, ns: int) -> list[tuple[bytes, int]]:
        """Return the blocks used at or after `ns`, in ns since 1970, and when they were used."""
        with self.transaction():
            self._clamp_uses()
            found = self.db.execute("SELECT key, last_used FROM blocks WHERE last_used >= ?", [ns]).fetchall()
        uses = [(self.codec.value_of(name, BLOCK), at) for name, at in found]
        return [(key, at) for key, at in uses if key is not None]

    def _clamp_uses(self) -> None:
        """Set uses in the future to now. A clock that was ahead recorded them, and they would rank as newest."""
        now = time.time_ns()
        self.db.execute("UPDATE blocks SET last_used = ?1 WHERE last_used > ?1", [now])

    def trim_changes(self) -> None:
        """Delete old changes."""
        with self.transaction():
            self.db.execute("DELETE FROM changes WHERE seq <= (SELECT max(seq) FROM changes) - ?", [_CHANGES_KEPT])

    def forget_changes(self) -> None:
        """Delete all changes. Processes that have not read them yet read every block instead."""
        with self.transaction():
            self.db.execute("DELETE FROM changes")

    def shrink(self) -> None:
        """Write the database anew without unused pages, and empty its log, as far as other processes let it."""
        with self._lock:
            for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                with contextlib.suppress(sqlite3.OperationalError):
                    self.db.conn.execute(statement).fetchall()

    # --- reservations ------------------------------------------------------------------------

    def reservations(self) -> dict[bytes, tuple[str, int]]:
        """Return owner and bytes of every block that is being written, by the name of its file."""
        with self._lock:
            found = self.db.execute("SELECT key, owner, n_bytes FROM reservations").fetchall()
        return {name: (owner, n_bytes) for name, owner, n_bytes in found}

    def reserve(self, key: bytes, owner: str, n_bytes: int) -> None:
        with self.transaction():
            self.db.table("reservations").insert(
                {"key": self.codec.name(key, BLOCK), "owner": owner, "n_bytes": n_bytes}, pk="key", replace=True
            )

    def reserved_by(self, key: bytes) -> str | None:
        with self._lock:
            return self._owner(self.db.conn, key)

    def release(self, key: bytes, owner: str) -> None:
        with self.transaction():
            for name in self.codec.names(key, BLOCK):
                self.db.execute("DELETE FROM reservations WHERE key = ? AND owner = ?", [name, owner])

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
