"""The index of a cache directory: one SQLite database, the source of truth for what is stored.

Written by one writer thread a process and read by others; several processes
may share it (WAL). A database that cannot be read is set aside and made anew,
to be filled again from the files.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import sqlite_utils

from erllama.cache.blocks import Block, SaveReason
from erllama.cache.keys import child_key
from erllama.errors import CacheError

log = logging.getLogger("erllama.cache")

SCHEMA_VERSION = 1
_BUSY_SECONDS = 10.0
# Primary result codes that tell of the database's surroundings, not of its content.
_SURROUNDINGS = {
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}


class IndexRow(NamedTuple):
    """One stored block: its file's size in bytes and when it was last used, in ns since 1970."""

    block: Block
    file_bytes: int
    last_used: int


class Index:
    """The database of one directory. Methods may be called from any thread.

    Raises:
        CacheError: the database is of a newer release; it is left untouched.
        OSError, sqlite3.Error: the directory cannot hold a database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            self._open_waiting()
        except (OSError, CacheError):
            raise
        except Exception as error:  # a damaged database shows itself in many ways, UnicodeDecodeError among them
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _SURROUNDINGS or not path.exists():
                raise
            self._set_aside(error)
            self._open_waiting()
        self._seen_version = self._data_version()

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
        existed = self.path.exists()
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
        )
        try:
            if not existed:
                self.path.chmod(0o600)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise CacheError(
                    f"{self.path} has version {version}; this release reads up to {SCHEMA_VERSION}. "
                    "Upgrade erllama, or give another directory"
                )
            self.db = sqlite_utils.Database(connection, execute_plugins=False)
            if version == 0:
                self._create()
            # A database whose pages are damaged often still opens: read all that will be needed.
            for _ in self.rows():
                pass
        except BaseException:
            connection.close()
            raise

    def _create(self) -> None:
        with self._transaction():
            self.db.table("blocks").create(
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
                    "created": int,
                    "last_used": int,
                },
                pk="key",
                not_null={"parent", "namespace", "start", "tokens", "file_bytes", "last_used"},
                if_not_exists=True,
            )
            self.db.table("fingerprints").create(
                {"identity": str, "sha256": str}, pk="identity", if_not_exists=True
            )
            self.db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _set_aside(self, error: Exception) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        log.warning("%s is damaged (%s); set aside as %s and rebuilt from the files", self.path, error, aside.name)
        for suffix in ("", "-wal", "-shm"):
            damaged = self.path.with_name(self.path.name + suffix)
            if damaged.exists():
                damaged.rename(aside.with_name(aside.name + suffix))

    def close(self) -> None:
        with self._lock:
            self.db.conn.close()

    def changed_by_others(self) -> bool:
        """Whether another connection has written since this was last asked.

        While a write of ours is under way, which may wait for another process,
        the answer is no: who asks does not wait, and asks again.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            version = self._data_version()
            changed, self._seen_version = version != self._seen_version, version
            return changed
        finally:
            self._lock.release()

    def rows(self) -> Iterator[IndexRow]:
        """Every stored block.

        Raises:
            sqlite3.DatabaseError: the database is damaged, or a row is not as it was written.
        """
        columns = "key, parent, namespace, start, tokens, reason, recipe, slice_end, file_bytes, last_used"
        try:
            with self._lock:
                found = self.db.execute(f"SELECT {columns} FROM blocks").fetchall()
        except UnicodeDecodeError as error:
            raise _DamagedError(str(error)) from error
        for key, parent, namespace, start, tokens, reason, recipe, slice_end, file_bytes, last_used in found:
            try:
                block = Block(key, parent, namespace, start, tokens, SaveReason(reason), recipe, slice_end)
                sound = child_key(parent, tokens) == key and min(start, slice_end, file_bytes, last_used) >= 0
            except (TypeError, ValueError):
                sound = False
            if not sound:
                raise _DamagedError("a row of the index contradicts itself")
            yield IndexRow(block, file_bytes, last_used)

    def put_new(self, block: Block, file_bytes: int, last_used: int) -> None:
        """Add a block unless it is there."""
        self.put(block, file_bytes, last_used, replace=False)

    def put(self, block: Block, file_bytes: int, last_used: int, *, replace: bool = True) -> None:
        """Add a block, or replace the one of the same key."""
        with self._transaction():
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
                    "file_bytes": file_bytes,
                    "created": time.time_ns(),
                    "last_used": last_used,
                },
                pk="key",
                replace=replace,
                ignore=not replace,
            )

    def remove(self, keys: Iterable[bytes]) -> None:
        with self._transaction():
            self.db.conn.executemany("DELETE FROM blocks WHERE key = ?", [(key,) for key in keys])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        """Note when blocks were last used: pairs of key and ns since 1970."""
        with self._transaction():
            self.db.conn.executemany(
                "UPDATE blocks SET last_used = max(last_used, ?) WHERE key = ?", [(at, key) for key, at in used]
            )

    def fingerprint(self, identity: str) -> str | None:
        """The digest remembered for a file's identity, if any."""
        with self._lock:
            row = self.db.execute("SELECT sha256 FROM fingerprints WHERE identity = ?", [identity]).fetchone()
        return str(row[0]) if row else None

    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        with self._transaction():
            self.db.table("fingerprints").insert(
                {"identity": identity, "sha256": sha256}, pk="identity", replace=True
            )

    def _data_version(self) -> int:
        return int(self.db.execute("PRAGMA data_version").fetchone()[0])

    def _transaction(self) -> _Transaction:
        return _Transaction(self.db.conn, self._lock)


class _DamagedError(sqlite3.DatabaseError):
    """The database can be read, but what it says cannot be."""


class _Transaction:
    """BEGIN IMMEDIATE to COMMIT under the lock, or ROLLBACK."""

    def __init__(self, connection: sqlite3.Connection, lock: threading.RLock) -> None:
        self._connection, self._lock = connection, lock

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._connection.execute("ROLLBACK" if kind else "COMMIT")
        finally:
            self._lock.release()
