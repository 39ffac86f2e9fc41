"""How stored responses are stored: as JSON, or encrypted with the keys of the cache's key file.

`ResponseStore` owns a codec. A database has one current key. When it is opened with a key file whose newest key is
another one, all responses are encrypted again. `erllama cache rekey` does that while a server uses the database.
The server then reads the key file again. A server without a key file uses the database no more.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from erllama.cache.blocks.encryption import Encryption
from erllama.errors import CacheFormatError, CacheKeyError

log = logging.getLogger("erllama.server")

FORMAT, ENCRYPTED_FORMAT = 1, 2  # user_version of the database


class ResponseCodec:
    """Stores responses as they are."""

    _path: Path | None = None

    def prepare(self, database: sqlite3.Connection, path: Path | None) -> None:
        """Check that the database is not encrypted, within a transaction.

        Raises:
            CacheKeyError: it is.
        """
        self._path = path
        self._check(database)
        database.execute(f"PRAGMA user_version = {FORMAT}")

    def refresh(self, database: sqlite3.Connection) -> None:
        """Begin a transaction, and use the current key of the database.

        The key stays the current one until the transaction ends.

        Raises:
            CacheKeyError: the key is missing.
        """
        _begin(database)
        self._check(database)

    def encode(self, content: bytes, id: str, part: str) -> bytes:
        """Return what is stored for a part of the response with an id."""
        return content

    def decode(self, stored: bytes, id: str, part: str) -> bytes:
        """Return the content that `encode` was called with.

        Raises:
            CacheFormatError: it was changed.
            CacheKeyError: the key is missing.
        """
        return stored

    def _check(self, database: sqlite3.Connection) -> None:
        if _format_of(database) == ENCRYPTED_FORMAT:
            raise CacheKeyError(
                f"the stored responses in {self._path} are encrypted; set the key_file of the cache"
            )


class EncryptedResponses(ResponseCodec):
    """Encrypts responses.

    Args:
        key_file: file of the keys, the newest first.

    Raises:
        CacheKeyError: the file cannot be used.
        MissingPackage: the package `cryptography` is not installed.
    """

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._encryption = Encryption.of_file(key_file)

    def prepare(self, database: sqlite3.Connection, path: Path | None) -> None:
        """Encrypt all responses with the newest key, within a transaction.

        Raises:
            CacheKeyError: the key of a response is missing.
        """
        before = _format_of(database)
        database.execute("CREATE TABLE IF NOT EXISTS encryption (key_id BLOB NOT NULL)")
        newest = self._encryption.current.key_id
        if before == ENCRYPTED_FORMAT and _current_key(database) == newest:
            return
        old = self if before == ENCRYPTED_FORMAT else ResponseCodec()
        for (id,) in database.execute("SELECT id FROM responses").fetchall():
            row = database.execute("SELECT input, response FROM responses WHERE id = ?", [id]).fetchone()
            try:
                parts = [
                    self.encode(old.decode(each, id, part), id, part)
                    for each, part in zip(row, ("input", "response"), strict=True)
                ]
            except CacheFormatError as error:
                log.warning("stored response %s: %s; removed", id, error)
                database.execute("DELETE FROM responses WHERE id = ?", [id])
            else:
                values = [*parts, sum(map(len, parts)), id]
                database.execute("UPDATE responses SET input = ?, response = ?, size = ? WHERE id = ?", values)
        database.execute("DELETE FROM encryption")
        database.execute("INSERT INTO encryption VALUES (?)", [newest])
        database.execute(f"PRAGMA user_version = {ENCRYPTED_FORMAT}")

    def refresh(self, database: sqlite3.Connection) -> None:
        _begin(database)
        current = _current_key(database)
        if self._encryption.current.key_id != current:
            read = Encryption.of_file(self._key_file)
            self._encryption = read.restricted(current, [key.key_id for key in read.keys])

    def encode(self, content: bytes, id: str, part: str) -> bytes:
        return self._encryption.seal(content, _context(id, part))

    def decode(self, stored: bytes, id: str, part: str) -> bytes:
        return self._encryption.open(stored, _context(id, part))


def codec_of(key_file: Path | None) -> ResponseCodec:
    """Return the codec for a key file; None for no encryption.

    Raises:
        CacheKeyError: the file cannot be used.
    """
    return ResponseCodec() if key_file is None else EncryptedResponses(key_file)


def _begin(database: sqlite3.Connection) -> None:
    if not database.in_transaction:
        database.execute("BEGIN IMMEDIATE")


def _format_of(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _current_key(database: sqlite3.Connection) -> bytes:
    row = database.execute("SELECT key_id FROM encryption").fetchone()
    if row is None:
        raise sqlite3.DatabaseError("the id of the current key is missing")
    return bytes(row[0])


def _context(id: str, part: str) -> bytes:
    """Return what binds a ciphertext to its place."""
    return f"response {part} {id}".encode()
