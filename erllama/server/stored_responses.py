"""Stored responses: what `/v1/responses` keeps so that a later request can continue a conversation by an id.

The store is a SQLite database, in memory or in a file that its owner alone can read. It is bounded by number and by
bytes; the least recently used responses are removed first. Each response belongs to one key, and other keys do not
find it. If the cache has a key file, requests and responses are encrypted. Any thread may call the methods.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from erllama.errors import CacheError, CacheKeyError, OptionError
from erllama.server.conduct.errors import ApiError
from erllama.server.response_codec import ENCRYPTED_FORMAT, FORMAT, ResponseCodec, codec_of

log = logging.getLogger("erllama.server")

FILE_NAME = "responses.sqlite"

# A client that sends the whole conversation each time stores it each time, 200 KiB for 40,000 tokens.
MAX_BYTES = 512 << 20
MAX_BYTES_IN_MEMORY = 64 << 20

_WAIT_SECONDS = 5.0  # for another process that writes to the database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    previous TEXT,       -- id of the response that it continues
    used INTEGER NOT NULL,  -- number of its last use; larger is later
    size INTEGER NOT NULL,  -- bytes of the next two
    input BLOB NOT NULL,    -- JSON: the items of its own request
    response BLOB NOT NULL  -- JSON
);
CREATE INDEX IF NOT EXISTS by_use ON responses (used);
"""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the request that it answers.

    Attributes:
        id: of the response.
        owner: whose it is; "" on a server without keys.
        previous: id of the response that it continues; None for the first response of a conversation.
        input: items of the request, without those of earlier responses.
        response: the response, as clients receive it.
    """

    id: str
    owner: str
    previous: str | None
    input: Sequence[Json]
    response: Json


class StoredTurn(NamedTuple):
    """The part of a stored response that later prompts contain.

    Attributes:
        id: of the response.
        input: items of its request, without those of earlier responses.
        output: items of its reply.
    """

    id: str
    input: Sequence[Json]
    output: Sequence[Json]


class _Output(msgspec.Struct):
    """The items of a response. Decoding only these is several times as fast: instructions and tools are long."""

    output: list[Json]


class MissingResponseError(LookupError):
    """A response is not stored: it never was, it was deleted or removed for newer ones, or it is another key's.

    Attributes:
        id: of the response.
    """

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id


class ResponseStore:
    """Keeps responses.

    Args:
        max_responses: number of responses. 0 to store none.
        directory: where the database is; it is created if it does not exist. None for memory.
        max_bytes: size of all stored requests and responses. None for MAX_BYTES, or MAX_BYTES_IN_MEMORY.
        key_file: file of the keys that encrypt the database; None for no encryption. Responses that are not
            encrypted with its newest key are encrypted with it.

    Raises:
        OptionError: the database cannot be opened.
        CacheKeyError: the key is missing or wrong. The database is not changed.
    """

    def __init__(
        self,
        max_responses: int = 0,
        directory: str | Path | None = None,
        max_bytes: int | None = None,
        key_file: Path | None = None,
    ) -> None:
        default = MAX_BYTES_IN_MEMORY if directory is None else MAX_BYTES
        self._max_responses, self._max_bytes = max_responses, default if max_bytes is None else max_bytes
        self._lock = threading.Lock()
        path = None if directory is None or not max_responses else Path(directory) / FILE_NAME
        try:
            self._codec = codec_of(None if path is None else key_file)
            self._database = _open(path, self._codec)
        except (OSError, sqlite3.Error) as error:
            if _is_busy(error):
                raise OptionError(
                    f"the stored responses in {path} cannot be opened: another process is writing to them; start "
                    "again when it has finished"
                ) from None
            raise OptionError(
                f"the stored responses in {path} cannot be opened: {error}; remove the file, or set another "
                "state_dir"
            ) from None
        self._finalize = weakref.finalize(self, self._database.close)
        with self._lock, self._database:
            self._evict()  # the limits may be lower than those of an earlier server

    def close(self) -> None:
        """Close the database. Idempotent."""
        with self._lock:
            self._finalize()

    def save(self, stored: StoredResponse) -> None:
        """Store a response, and remove others if there are too many. One larger than the limit is dropped.

        Raises:
            ApiError: another process is writing to the database. The client may try again.
        """
        if not self._max_responses:
            return
        input, response = msgspec.json.encode(stored.input), msgspec.json.encode(stored.response)
        with self._transaction():
            try:
                self._codec.refresh(self._database)
            except CacheKeyError as error:
                log.warning("a response is not stored: %s", error)
                return
            input = self._codec.encode(input, stored.id, "input")
            response = self._codec.encode(response, stored.id, "response")
            size = len(input) + len(response)
            if size > self._max_bytes:
                return
            self._database.execute(
                "INSERT OR REPLACE INTO responses VALUES"
                " (?, ?, ?, (SELECT ifnull(max(used), 0) + 1 FROM responses), ?, ?, ?)",
                (stored.id, stored.owner, stored.previous, size, input, response),
            )
            self._evict()

    def get(self, id: str, owner: str) -> StoredResponse:
        """Return a response.

        Raises:
            MissingResponseError: it is not stored.
            ApiError: another process is writing to the database. The client may try again.
        """
        with self._transaction():
            previous, input, response = self._use(id, owner)
        return StoredResponse(id, owner, previous, msgspec.json.decode(input), msgspec.json.decode(response))

    def conversation(self, id: str, owner: str) -> list[StoredTurn]:
        """Return a response and all that it continues, oldest first. They count as used.

        Raises:
            MissingResponseError: one of them is not stored.
            ApiError: another process is writing to the database. The client may try again.
        """
        found: list[StoredTurn] = []
        with self._transaction():
            next_id: str | None = id
            while next_id is not None:
                previous, input, response = self._use(next_id, owner)
                output = msgspec.json.decode(response, type=_Output).output
                found.append(StoredTurn(next_id, msgspec.json.decode(input), output))
                next_id = previous
        return found[::-1]

    def delete(self, id: str, owner: str) -> None:
        """Delete a response. Later responses that continue it cannot be continued any more.

        Raises:
            MissingResponseError: it is not stored.
            ApiError: another process is writing to the database. The client may try again.
        """
        with self._transaction():
            deleted = self._database.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (id, owner))
            if not deleted.rowcount:
                raise MissingResponseError(id)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._lock, self._database:
                yield
        except sqlite3.OperationalError as error:
            if not _is_busy(error):
                raise
            message = "another process is encrypting the stored responses with a new key; try again"
            raise ApiError("unavailable", message, "responses_busy", retry_after=1) from error

    def _use(self, id: str, owner: str) -> tuple[str | None, bytes, bytes]:
        """Return the previous response's id, the input and the response of a response, which counts as used."""
        try:
            self._codec.refresh(self._database)  # before the row is read, which may be encrypted again meanwhile
            row: tuple[str | None, bytes, bytes] | None = self._database.execute(
                "SELECT previous, input, response FROM responses WHERE id = ? AND owner = ?", (id, owner)
            ).fetchone()
            if row is None:
                raise MissingResponseError(id)
            input, response = self._codec.decode(row[1], id, "input"), self._codec.decode(row[2], id, "response")
        except CacheError as error:
            log.warning("stored response %s cannot be used: %s", id, error)
            raise MissingResponseError(id) from error
        self._database.execute(
            "UPDATE responses SET used = (SELECT max(used) + 1 FROM responses) WHERE id = ?", (id,)
        )
        return row[0], input, response

    def _evict(self) -> None:
        n, size = self._database.execute("SELECT count(*), ifnull(sum(size), 0) FROM responses").fetchone()
        while n > self._max_responses or size > self._max_bytes:
            oldest, bytes_of_it = self._database.execute(
                "SELECT id, size FROM responses ORDER BY used LIMIT 1"
            ).fetchone()
            self._database.execute("DELETE FROM responses WHERE id = ?", (oldest,))
            n, size = n - 1, size - bytes_of_it


def encrypt_again(directory: Path, key_file: Path) -> None:
    """Encrypt the responses in a directory with the newest key of a file. A server may use them meanwhile.

    Raises:
        CacheKeyError: a key in use is missing.
        OSError, sqlite3.Error: the database cannot be changed.
    """
    database = _open(directory / FILE_NAME, codec_of(key_file))
    try:
        database.execute("VACUUM")  # no unused page has what an old key encrypted
    finally:
        database.close()


def _is_busy(error: Exception) -> bool:
    """Return whether SQLite has waited in vain for another process."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF == sqlite3.SQLITE_BUSY


def _open(path: Path | None, codec: ResponseCodec) -> sqlite3.Connection:
    """Open a database, and create it if it does not exist. Prompts are private: only the user may read the file."""
    if path is not None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # SQLite gives its journal the same mode
        finally:
            os.close(descriptor)
    database = sqlite3.connect(":memory:" if path is None else path, timeout=_WAIT_SECONDS, check_same_thread=False)
    try:
        database.execute("PRAGMA secure_delete = ON")  # the text of a deleted prompt does not stay in the file
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, FORMAT, ENCRYPTED_FORMAT):
            known = f"{FORMAT} and {ENCRYPTED_FORMAT}"
            raise sqlite3.DatabaseError(f"its format is {version}, and this version of erllama reads {known}")
        database.executescript(_SCHEMA)
        with database:
            database.execute("BEGIN IMMEDIATE")
            codec.prepare(database, path)
    except BaseException:
        database.close()
        raise
    return database
