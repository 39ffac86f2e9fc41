"""Tables of the index of a cache directory, their version, and the detection of damaged databases.

`Index` opens databases with these functions, and `FileTier` asks them, after an error, whether the database is
damaged. A damaged database is moved aside and rebuilt. The list of blocks is read again from the block files. Pins,
tokens of texts and digests of model files are in the database alone, and are lost.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import sqlite_utils

from erllama._runtime.log import logger
from erllama.cache.tiers.text_table import create_text_tables
from erllama.errors import CacheError

log = logger("erllama.cache")

SCHEMA_VERSION = 6
ENCRYPTED_VERSION = 7  # the tables of version 6 with encrypted columns, and the table `encryption`
TEXTS_SINCE = 5  # the oldest version whose tables of texts are those of today
_BUSY_SECONDS = 10.0  # how long a writer waits for another process
# Primary result codes of a damaged schema that other faults have, too.
_AMBIGUOUS_CODES = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH)


class DamagedIndexError(sqlite3.DatabaseError):
    """SQLite can read the database, but its content contradicts itself."""


# --- opening ---------------------------------------------------------------------------------


def connect(path: Path, *, wait: bool) -> sqlite3.Connection:
    """Open a connection in autocommit mode, for any thread.

    Args:
        wait: whether statements wait for other processes, up to 10 seconds.
    """
    timeout = _BUSY_SECONDS if wait else 0.0
    return sqlite3.connect(path, timeout=timeout, check_same_thread=False, isolation_level=None)


def retry_while_locked(action: Callable[[], None]) -> None:
    """Call `action` again while another process creates the database: SQLite's own timeout does not cover that."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            action()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def check_version(path: Path, connection: sqlite3.Connection) -> int:
    """Return the version of the database.

    Raises:
        CacheError: it is newer than this release.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > ENCRYPTED_VERSION:
        raise CacheError(
            f"{path} has version {version}; this release reads up to {ENCRYPTED_VERSION}. "
            "Upgrade erllama, or use another directory"
        )
    return version


def create_tables(db: sqlite_utils.Database, version: int = 0, *, encrypted: bool = False) -> None:
    """Create the tables that a database of a version lacks. Tables of texts in an older form become empty."""
    if encrypted:
        db.execute("CREATE TABLE IF NOT EXISTS encryption (key_id BLOB PRIMARY KEY, current INTEGER NOT NULL)")
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
    if version < TEXTS_SINCE:
        create_text_tables(db.conn)
    # Never reuses a number, so that the largest one and the number of rows change with every change of a pin.
    db.execute(
        "CREATE TABLE IF NOT EXISTS pins (seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, "
        "model TEXT NOT NULL, model_key BLOB NOT NULL, n_tokens INTEGER NOT NULL, blocks BLOB NOT NULL, "
        "created REAL NOT NULL, expires REAL)"
    )
    # AUTOINCREMENT: numbers are not reused after old entries were removed.
    db.execute("CREATE TABLE IF NOT EXISTS changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL)")
    # Updates of last_used are not recorded as changes: they are many, and only eviction reads them.
    for event, side in (("INSERT", "new"), ("DELETE", "old")):
        db.execute(
            f"CREATE TRIGGER IF NOT EXISTS noted_{event.lower()} AFTER {event} ON blocks "
            f"BEGIN INSERT INTO changes (key) VALUES ({side}.key); END"
        )
    db.execute("CREATE INDEX IF NOT EXISTS by_use ON blocks (last_used)")


# --- damage ----------------------------------------------------------------------------------


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code of an error, 0 if it has none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def shows_damage(error: BaseException) -> bool:
    """Return whether an error proves that the content of the database is damaged."""
    if isinstance(error, DamagedIndexError | UnicodeDecodeError):
        return True
    # Other codes have other causes, too. For example, statements in the wrong order are SQLITE_ERROR.
    return isinstance(error, sqlite3.Error) and primary_code(error) in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    )


def may_show_damage(error: sqlite3.Error) -> bool:
    """Return whether a damaged schema, such as a missing table, may have caused an error. `is_damaged` decides."""
    return shows_damage(error) or primary_code(error) in _AMBIGUOUS_CODES


def is_damaged(path: Path) -> bool:
    """Return whether a database fails SQLite's check or lacks a part of this release's schema.

    Raises:
        sqlite3.Error: the database cannot be read now.
    """
    try:
        with contextlib.closing(connect(path, wait=True)) as connection:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version not in (SCHEMA_VERSION, ENCRYPTED_VERSION):
                return False  # opening migrates it, or refuses it
            found = set(connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall())
            sound = connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if not shows_damage(error):
            raise
        return True
    return not sound or not _expected_schema(version == ENCRYPTED_VERSION) <= found


@functools.cache
def _expected_schema(encrypted: bool) -> set[tuple[str, str, str]]:
    """Return the rows of `sqlite_master` in a database that this release creates."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        create_tables(sqlite_utils.Database(connection, execute_plugins=False), encrypted=encrypted)
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    return {row for row in rows if not row[1].startswith("sqlite_")}


def quarantine(path: Path, error: Exception) -> None:
    """Rename a damaged database, so that the next opening creates a new one.

    Raises:
        CacheError: the database is of a newer release. It stays where it is.
    """
    with contextlib.suppress(sqlite3.Error), contextlib.closing(connect(path, wait=False)) as connection:
        check_version(path, connection)
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    log.warning("%s is damaged (%s); renamed to %s, and rebuilt from the files", path, error, aside.name)
    # One copy is enough to find the cause; it counts towards no budget.
    for earlier in path.parent.glob(f"{path.name}.damaged-*"):
        earlier.unlink(missing_ok=True)
    # The log first: a database that another process creates meanwhile must not find this one's log.
    for suffix in ("-wal", "-shm", ""):
        damaged = path.with_name(path.name + suffix)
        if damaged.exists():
            damaged.rename(aside.with_name(aside.name + suffix))
