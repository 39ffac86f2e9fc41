"""The index of a cache directory: one SQLite database, the source of truth for what is stored.

Several processes share it (WAL). Each writes through one connection, in short
transactions, and reads what the others wrote through another, which never
waits. Triggers note every change of a block, so that a process reads only what
is new to it. A database that cannot be read is set aside and made anew, to be
filled again from the files.
"""

from __future__ import annotations

import contextlib
import functools
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
from erllama.cache.tiers.text_table import TextTable, create_text_tables
from erllama.cache.tiers.tier import Changes, TierRow
from erllama.errors import CacheError

log = logger("erllama.cache")

SCHEMA_VERSION = 5
_BUSY_SECONDS = 10.0
_CHANGES_KEPT = 20_000  # a process that is further behind reads everything
_TRIM_EVERY = 1_000  # blocks written between two removals of older entries
_COLUMNS = "b.key, parent, namespace, start, tokens, reason, recipe, slice_end, file_bytes, last_used"
# Primary result codes that a damaged schema gives, and other faults, too.
_DOUBTFUL = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH)


class FileStamp(NamedTuple):
    """What tells one version of a file from another: its bytes, and its mtime in ns."""

    n_bytes: int
    mtime_ns: int


class Index:
    """The database of one directory. Methods may be called from any thread.

    Raises:
        CacheError: the database is of a newer release, and is left untouched; or it cannot be shared.
        OSError, sqlite3.Error: the directory cannot hold a database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._in_transaction = False
        self._puts = 0
        self._read_lock = threading.Lock()
        try:
            self._open_waiting()
        except (OSError, CacheError):
            raise
        except sqlite3.Error as error:
            if not path.exists() or not (tells_damage(error) or (_code(error) in _DOUBTFUL and is_damaged(path))):
                raise
            set_aside(path, error)
            self._open_waiting()
        except (
            ValueError,
            TypeError,
            OverflowError,
        ) as error:  # content that cannot be read, as text that is no UTF-8
            set_aside(path, error)
            self._open_waiting()
        self.inode = path.stat().st_ino

    # --- opening ---------------------------------------------------------------------------

    def _open_waiting(self) -> None:
        """Open; wait for a process that makes the database just now, which SQLite's own wait does not cover."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._open()
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _open(self) -> None:
        with contextlib.ExitStack() as undo:
            existed = self.path.exists()
            connection = _connect(self.path, _BUSY_SECONDS)
            undo.callback(connection.close)
            if not existed:
                self.path.chmod(0o600)
            version = check_version(self.path, connection)
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                raise CacheError(
                    f"{self.path.parent} is on a file system that databases cannot share; give a local one"
                )
            connection.execute("PRAGMA synchronous=NORMAL")
            self.db = sqlite_utils.Database(connection, execute_plugins=False)
            if version < SCHEMA_VERSION:
                self._create(version)
            # Requests read through this one: it must not wait for anyone.
            self._reader = _connect(self.path, 0.0)
            undo.callback(self._reader.close)
            self.texts = TextTable(connection, self._read)
            self._seen_version = self._data_version()
            # A database whose pages are damaged often still opens: read all that will be needed.
            self._first_rows: list[TierRow] | None
            self._seen, self._first_rows = read_all(self._reader)
            undo.pop_all()

    def _create(self, version: int) -> None:
        with self.transaction():
            if version < 3:
                # The files have everything: it is read again from them.
                self.db.execute("DROP TABLE IF EXISTS blocks")
            _create_tables(self.db)
            self.db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    @property
    def lost(self) -> bool:
        """Whether the database that is open is no longer the one in the directory."""
        try:
            return self.path.stat().st_ino != self.inode
        except (FileNotFoundError, NotADirectoryError):  # another error is no evidence
            return True

    def close(self) -> None:
        with self._lock, self._read_lock:
            self.db.conn.close()
            self._reader.close()

    # --- reading ---------------------------------------------------------------------------

    def rows(self) -> list[TierRow]:
        """Every stored block; `changes` then tells what is new since.

        Raises:
            sqlite3.DatabaseError: the database is damaged, or a row is not as it was written.
        """
        with self._read_lock:
            first, self._first_rows = self._first_rows, None
            if first is None:
                self._seen, first = read_all(self._reader)
            return first

    def rows_now(self) -> list[TierRow]:
        """Every stored block; `changes` goes on from where it was."""
        with contextlib.closing(_connect(self.path, _BUSY_SECONDS)) as reader:
            return read_all(reader)[1]

    def stamps(self) -> dict[bytes, FileStamp]:
        """What the index knows of every block's file, by key."""
        with self._lock:
            found = self.db.execute("SELECT key, file_bytes, mtime_ns FROM blocks").fetchall()
        return {key: FileStamp(n_bytes, mtime_ns) for key, n_bytes, mtime_ns in found}

    def changes(self) -> Changes | None:
        """What was written since the last look, by whomever; None for nothing. Waits for nobody."""
        with self._read_lock:
            try:
                version = self._data_version()
                if version == self._seen_version:
                    return None
                found = self._read_changes()
            except sqlite3.OperationalError as error:
                if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    return None  # somebody has the database for himself: another time
                raise
            self._seen_version = version
            return found

    def _read_changes(self) -> Changes:
        with _reading(self._reader):  # both from one moment
            return self._changes_now()

    def _changes_now(self) -> Changes:
        oldest = self._reader.execute("SELECT min(seq) FROM changes").fetchone()[0]
        if oldest is not None and oldest > self._seen + 1:
            self._seen, rows = _rows_now(self._reader)
            return Changes(rows, [], complete=True)
        found = self._reader.execute(
            f"SELECT c.seq, c.key, {_COLUMNS} FROM changes c LEFT JOIN blocks b ON b.key = c.key "
            "WHERE c.seq > ? ORDER BY c.seq",
            [self._seen],
        ).fetchall()
        if found:
            self._seen = found[-1][0]
        stored = {row[1]: _checked_row(*row[2:]) for row in found if row[2] is not None}
        removed = [key for _, key, *row in found if row[0] is None]
        return Changes(list(stored.values()), removed, complete=False)

    def stamp(self, key: bytes) -> FileStamp | None:
        """What the index knows of a block's file."""
        with self._lock:
            row = self.db.execute("SELECT file_bytes, mtime_ns FROM blocks WHERE key = ?", [key]).fetchone()
        return FileStamp(*row) if row else None

    def writer_of(self, key: bytes) -> str | None:
        """Who is writing a block, as far as is committed. Waits for nobody."""
        with self._read_lock:
            row = self._reader.execute("SELECT owner FROM reservations WHERE key = ?", [key]).fetchone()
        return str(row[0]) if row else None

    def _read(self, query: str, values: list[Any]) -> list[tuple[Any, ...]]:
        """What is committed; nothing where somebody has the database for himself. Waits for nobody."""
        with self._read_lock:
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    return []
                raise

    def _data_version(self) -> int:
        return int(self._reader.execute("PRAGMA data_version").fetchone()[0])

    # --- writing ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within, or nothing of it; within another transaction, too."""
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
                if connection.in_transaction:  # SQLite itself has ended it otherwise
                    connection.execute("ROLLBACK TO part")
                raise
            finally:
                if connection.in_transaction:
                    connection.execute("RELEASE part")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other process writes meanwhile. What was written within stays, whatever is raised: files are gone."""
        with self._lock:
            if self._in_transaction:
                yield
                return
            connection = self.db.conn
            _roll_back(connection)  # what an exception at the worst moment left open
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
        """Add a block, or replace the one of the same key, or leave that as it is."""
        with self.transaction():
            self._puts += 1
            if self._puts % _TRIM_EVERY == 1:
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
        """Note when blocks were last used: pairs of key and ns since 1970."""
        with self.transaction():
            self._clamp_uses()
            self.db.conn.executemany(
                "UPDATE blocks SET last_used = ?1 WHERE key = ?2 AND last_used < ?1",
                [(at, key) for key, at in used],
            )

    def uses_since(self, ns: int) -> list[tuple[bytes, int]]:
        """Blocks used at or after a time, in ns since 1970, and when."""
        with self.transaction():
            self._clamp_uses()
            return self.db.execute("SELECT key, last_used FROM blocks WHERE last_used >= ?", [ns]).fetchall()

    def _clamp_uses(self) -> None:
        """A use in the future was noted by a clock that was ahead: nothing would be newer until then."""
        now = time.time_ns()
        self.db.execute("UPDATE blocks SET last_used = ?1 WHERE last_used > ?1", [now])

    def trim_changes(self) -> None:
        """Drop old entries of the list of changes."""
        with self.transaction():
            self.db.execute("DELETE FROM changes WHERE seq <= (SELECT max(seq) FROM changes) - ?", [_CHANGES_KEPT])

    # --- reservations ------------------------------------------------------------------------

    def reservations(self) -> dict[bytes, tuple[str, int]]:
        """Owner and bytes of what is being written, by key."""
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
        """Drop everything that these owners reserved."""
        with self.transaction():
            self.db.conn.executemany("DELETE FROM reservations WHERE owner = ?", [(owner,) for owner in owners])

    # --- fingerprints ------------------------------------------------------------------------

    def fingerprint(self, identity: str) -> str | None:
        """The digest remembered for a file's identity, if any."""
        with self._lock:
            row = self.db.execute("SELECT sha256 FROM fingerprints WHERE identity = ?", [identity]).fetchone()
        return str(row[0]) if row else None

    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        with self.transaction():
            self.db.table("fingerprints").insert(
                {"identity": identity, "sha256": sha256}, pk="identity", replace=True
            )


def _create_tables(db: sqlite_utils.Database) -> None:
    """Make what is not there yet; the tables of texts are made anew."""
    db.table("blocks").create(
        {
            "key": bytes,
            "parent": bytes,
            "namespace": bytes,
            "start": int,
            "tokens": bytes,
            "reason": int,
            "recipe": bytes,
            "slice_end": int,
            "file_bytes": int,
            "mtime_ns": int,
            "last_used": int,
        },
        pk="key",
        not_null={"parent", "namespace", "start", "tokens", "file_bytes", "mtime_ns", "last_used"},
        if_not_exists=True,
    )
    db.table("reservations").create(
        {"key": bytes, "owner": str, "n_bytes": int},
        pk="key",
        not_null={"owner", "n_bytes"},
        if_not_exists=True,
    )
    db.table("fingerprints").create({"identity": str, "sha256": str}, pk="identity", if_not_exists=True)
    create_text_tables(db.conn)
    # AUTOINCREMENT: numbers go on where old entries were removed.
    db.execute("CREATE TABLE IF NOT EXISTS changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL)")
    # Uses are no changes: they are many, and of interest only to who evicts.
    for event, side in (("INSERT", "new"), ("DELETE", "old")):
        db.execute(
            f"CREATE TRIGGER IF NOT EXISTS noted_{event.lower()} AFTER {event} ON blocks "
            f"BEGIN INSERT INTO changes (key) VALUES ({side}.key); END"
        )
    db.execute("CREATE INDEX IF NOT EXISTS by_use ON blocks (last_used)")


class _DamagedError(sqlite3.DatabaseError):
    """The database can be read, but what it says cannot be."""


def tells_damage(error: BaseException) -> bool:
    """Whether an error says that the database's content is not what was written."""
    if isinstance(error, _DamagedError | UnicodeDecodeError):
        return True
    # Other codes have other reasons, too: our own statements in the wrong order are SQLITE_ERROR.
    return isinstance(error, sqlite3.Error) and _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def may_tell_damage(error: sqlite3.Error) -> bool:
    """Whether an error may come of a damaged schema, one without a table, say; `is_damaged` finds out."""
    return tells_damage(error) or _code(error) in _DOUBTFUL


def is_damaged(path: Path) -> bool:
    """Whether a database is not as this release makes it, or does not check out. Changes nothing.

    Raises:
        sqlite3.Error: it cannot be read now.
    """
    try:
        with contextlib.closing(_connect(path, _BUSY_SECONDS)) as connection:
            if int(connection.execute("PRAGMA user_version").fetchone()[0]) != SCHEMA_VERSION:
                return False  # opening brings it up to date, or refuses it
            found = set(connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall())
            sound = connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if not tells_damage(error):
            raise
        return True
    return not sound or not _schema() <= found


@functools.cache
def _schema() -> set[tuple[str, str, str]]:
    """What `sqlite_master` of a database lists that this release made."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        _create_tables(sqlite_utils.Database(connection, execute_plugins=False))
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    return {row for row in rows if not row[1].startswith("sqlite_")}


def _code(error: sqlite3.Error) -> int:
    """The primary result code."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def set_aside(path: Path, error: Exception) -> None:
    """Take a damaged database out of the way; one that is only newer is left.

    Raises:
        CacheError: it is of a newer release.
    """
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_connect(path, 0.0)) as connection:
        check_version(path, connection)
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    log.warning("%s is damaged (%s); set aside as %s and rebuilt from the files", path, error, aside.name)
    # One is enough to see what happened; it is outside every budget.
    for earlier in path.parent.glob(f"{path.name}.damaged-*"):
        earlier.unlink(missing_ok=True)
    # The log first: a database that somebody makes meanwhile must not find this one's.
    for suffix in ("-wal", "-shm", ""):
        damaged = path.with_name(path.name + suffix)
        if damaged.exists():
            damaged.rename(aside.with_name(aside.name + suffix))


def check_version(path: Path, connection: sqlite3.Connection) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise CacheError(
            f"{path} has version {version}; this release reads up to {SCHEMA_VERSION}. "
            "Upgrade erllama, or give another directory"
        )
    return version


def _connect(path: Path, timeout: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=timeout, check_same_thread=False, isolation_level=None)


def _roll_back(connection: sqlite3.Connection) -> None:
    """End a transaction that is open, if any: others wait for it."""
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def _reading(reader: sqlite3.Connection) -> Iterator[None]:
    """What is read within is of one moment."""
    _roll_back(reader)
    try:
        reader.execute("BEGIN")
        yield
    finally:
        _roll_back(reader)


def read_all(reader: sqlite3.Connection) -> tuple[int, list[TierRow]]:
    """The number of the last change, and every block as of then."""
    with _reading(reader):
        return _rows_now(reader)


def _rows_now(reader: sqlite3.Connection) -> tuple[int, list[TierRow]]:
    try:
        seen = reader.execute("SELECT coalesce(max(seq), 0) FROM changes").fetchone()[0]
        found = reader.execute(f"SELECT {_COLUMNS} FROM blocks b").fetchall()
    except UnicodeDecodeError as error:
        raise _DamagedError(str(error)) from error
    return seen, [_checked_row(*row) for row in found]


def _checked_row(
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
        raise _DamagedError("a row of the index contradicts itself")
    return TierRow(block, file_bytes, min(last_used, time.time_ns()))  # a clock may have been ahead
