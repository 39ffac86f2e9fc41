"""Text records in the database of the index: the persistent counterpart of `TextCache`.

    texts        one row per text: digest, anchor, n_bytes, head (the key of its tokens), seal (a checksum),
                 last_used
    text_pieces  token chunks by key, each once; `uses` counts the texts and chunks that refer to it
    text_total   one row: the bytes of both tables, updated by triggers

`Index` owns a `TextTable`. The caller of a method that writes holds a transaction, so that a crash leaves the
tables unchanged, and any number of processes may write. Every row is verified by its checksum, and every chunk by
its key. If one does not match, the lookup finds no text, and the next `remember` empties the tables. With a key,
`RowCodec` turns digests, anchors and keys into names, and encrypts the tokens.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erllama.cache.texts.text_tokens import ANCHOR_BYTES, TextDigests, TextRecord
from erllama.cache.texts.token_chain import ROOT, TokenChunk, chain_key, join_tokens, split_tokens
from erllama.cache.tiers.row_codec import ANCHOR, CHUNK, TEXT, RowCodec
from erllama.errors import CacheError

_MAX_PARAMETERS = 500  # of one query; SQLite allows at least 999
# Bytes of a row without its tokens, with its index entries and the unused part of pages.
_TEXT_OVERHEAD, _CHUNK_OVERHEAD = 300, 250

Read = Callable[[str, list[Any]], list[tuple[Any, ...]]]


def create_text_tables(connection: sqlite3.Connection) -> None:
    """Create the tables, empty. Drops tables of the same names."""
    for table in ("texts", "text_pieces", "text_total"):
        connection.execute(f"DROP TABLE IF EXISTS {table}")
    connection.execute(
        "CREATE TABLE texts (digest BLOB PRIMARY KEY, anchor BLOB NOT NULL, n_bytes INTEGER NOT NULL, "
        "head BLOB NOT NULL, seal BLOB NOT NULL, last_used INTEGER NOT NULL) WITHOUT ROWID"
    )
    connection.execute("CREATE INDEX texts_by_anchor ON texts (anchor, n_bytes)")
    connection.execute("CREATE INDEX texts_by_use ON texts (last_used)")
    connection.execute(
        "CREATE TABLE text_pieces (key BLOB PRIMARY KEY, parent BLOB NOT NULL, tokens BLOB NOT NULL, "
        "uses INTEGER NOT NULL) WITHOUT ROWID"
    )
    connection.execute("CREATE TABLE text_total (n_bytes INTEGER NOT NULL)")
    connection.execute("INSERT INTO text_total VALUES (0)")
    for event, side, sign in (("INSERT", "new", "+"), ("DELETE", "old", "-")):
        for table, size in (
            ("texts", f"{_TEXT_OVERHEAD}"),
            ("text_pieces", f"{_CHUNK_OVERHEAD} + LENGTH({side}.tokens)"),
        ):
            connection.execute(
                f"CREATE TRIGGER {table}_{event.lower()} AFTER {event} ON {table} "
                f"BEGIN UPDATE text_total SET n_bytes = n_bytes {sign} ({size}); END"
            )


class TextTable:
    """The tables of texts in one database.

    Args:
        connection: connection for writes, within a transaction of the caller.
        read: runs a query on committed rows, from any thread, and never waits.
        codec: of the index.
    """

    def __init__(self, connection: sqlite3.Connection, read: Read, codec: RowCodec) -> None:
        self._connection, self._read, self._codec = connection, read, codec
        self._found_damage = False  # a row or a chunk did not match its checksum or key

    def remember(self, record: TextRecord, limit_bytes: int) -> None:
        """Store a text, and evict the least recently used texts until all take at most `limit_bytes`."""
        if self._found_damage:
            self.clear()
        self._total_bytes()  # before triggers add to it, which would turn an invalid value into a number
        chunks = split_tokens(record.tokens)
        digest, anchor = self._codec.name(record.digest, TEXT), self._codec.name(record.anchor, ANCHOR)
        head = self._codec.name(chain_key(chunks), CHUNK)
        seal = _row_checksum(digest, record.n_bytes, head)
        before = self._connection.execute("SELECT head FROM texts WHERE digest = ?", [digest]).fetchone()
        self._add_reference(chunks)
        # Not REPLACE, because its deletions run no triggers.
        self._connection.execute(
            "INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
            "(anchor, n_bytes, head, seal, last_used) = "
            "(excluded.anchor, excluded.n_bytes, excluded.head, excluded.seal, excluded.last_used)",
            [digest, anchor, record.n_bytes, head, seal, time.time_ns()],
        )
        if before is not None:
            self._drop_reference(before[0])
        if self._total_bytes() > limit_bytes:
            self._clamp_uses()
        while self._total_bytes() > limit_bytes:
            self._evict_oldest()

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        """Record when texts were last used: pairs of digest and ns since 1970."""
        self._clamp_uses()
        self._connection.executemany(
            "UPDATE texts SET last_used = ?2 WHERE digest = ?1 AND last_used < ?2",
            [(self._codec.name(digest, TEXT), at) for digest, at in used],
        )

    def longest(self, digests: TextDigests, longer_than: int) -> TextRecord | None:
        """Return the longest stored text that a text begins with, if it has more than `longer_than` bytes."""
        if not self._read("SELECT 1 FROM texts LIMIT 1", []):
            return None
        anchors = digests.anchors[longer_than // ANCHOR_BYTES :]
        for end in range(len(anchors), 0, -_MAX_PARAMETERS):
            some = [self._codec.name(each, ANCHOR) for each in anchors[max(0, end - _MAX_PARAMETERS) : end]]
            rows = self._select_texts("DISTINCT n_bytes", "anchor", some)
            lengths = {row[0] for row in rows if isinstance(row[0], int) and row[0] > longer_than}
            candidates = digests.prefixes(lengths)
            for at in range(0, len(candidates), _MAX_PARAMETERS):
                found = self._first_stored(candidates[at : at + _MAX_PARAMETERS], digests)
                if found is not None:
                    return found
        return None

    # --- reading -------------------------------------------------------------------------------

    def _select_texts(self, columns: str, column: str, values: list[bytes]) -> list[tuple[Any, ...]]:
        marks = ", ".join("?" * len(values))
        return self._read(f"SELECT {columns} FROM texts WHERE {column} IN ({marks})", values)

    def _first_stored(self, candidates: list[tuple[int, bytes]], digests: TextDigests) -> TextRecord | None:
        """Return the record of the first of these lengths and digests that is stored."""
        names = [self._codec.name(digest, TEXT) for _, digest in candidates]
        stored = {
            name: (head, seal) for name, head, seal in self._select_texts("digest, head, seal", "digest", names)
        }
        for name, (n_bytes, digest) in zip(names, candidates, strict=True):
            head, seal = stored.get(name, (None, None))
            if head is None:
                continue
            # The length of the prefix with this digest, and not the one in the row, which may be wrong.
            if not isinstance(head, bytes) or seal != _row_checksum(name, n_bytes, head):
                self._found_damage = True
                continue
            tokens = self._tokens(head)
            if tokens is not None:
                return TextRecord(digest, digests.anchors[n_bytes // ANCHOR_BYTES], n_bytes, tokens)
        return None

    def _tokens(self, head: bytes) -> NDArray[np.int32] | None:
        """Return the tokens up to a chunk; None if one is missing, which may happen at any time, or damaged."""
        parts = []
        root = self._codec.name(ROOT, CHUNK)
        while head != root:
            rows = self._read("SELECT parent, tokens FROM text_pieces WHERE key = ?", [head])
            if not rows:
                return None
            chunk = self._chunk(head, *rows[0])
            if chunk is None or not chunk.is_sound:
                self._found_damage = True
                return None
            parts.append(chunk.tokens)
            head = rows[0][0]
        return join_tokens(parts[::-1])

    def _chunk(self, name: bytes, parent_name: bytes, stored: bytes) -> TokenChunk | None:
        """Return the chunk of a row; None if the row is not as it was written."""
        try:
            key, parent = self._codec.value_of(name, CHUNK), self._codec.value_of(parent_name, CHUNK)
            tokens = self._codec.decode_tokens(stored, name)
        except (TypeError, CacheError):
            return None
        return None if key is None or parent is None else TokenChunk(key, parent, tokens)

    # --- writing -------------------------------------------------------------------------------

    def _add_reference(self, chunks: list[TokenChunk]) -> None:
        """Store the missing chunks, and add a reference to the last chunk."""
        missing: list[tuple[bytes, bytes, bytes]] = []
        for chunk in reversed(chunks):
            name = self._codec.name(chunk.key, CHUNK)
            if self._connection.execute("SELECT 1 FROM text_pieces WHERE key = ?", [name]).fetchone():
                break
            tokens = self._codec.encode_tokens(chunk.tokens, name)
            missing.append((name, self._codec.name(chunk.parent, CHUNK), tokens))
        self._connection.executemany("INSERT INTO text_pieces VALUES (?, ?, ?, 1)", missing[::-1])
        stays = missing[-1][1] if missing else self._codec.name(chain_key(chunks), CHUNK)
        self._connection.execute("UPDATE text_pieces SET uses = uses + 1 WHERE key = ?", [stays])

    def _drop_reference(self, head: bytes) -> None:
        """Drop one reference, and delete the chunks that have none left."""
        while True:
            self._connection.execute("UPDATE text_pieces SET uses = uses - 1 WHERE key = ?", [head])
            row = self._connection.execute(
                "SELECT parent FROM text_pieces WHERE key = ? AND uses <= 0", [head]
            ).fetchone()
            if row is None:
                return
            self._connection.execute("DELETE FROM text_pieces WHERE key = ?", [head])
            head = row[0]

    def _clamp_uses(self) -> None:
        """Set uses in the future to now. A clock that was ahead recorded them."""
        self._connection.execute("UPDATE texts SET last_used = ?1 WHERE last_used > ?1", [time.time_ns()])

    def _evict_oldest(self) -> None:
        row = self._connection.execute("SELECT digest, head FROM texts ORDER BY last_used LIMIT 1").fetchone()
        if row is None:
            self.clear()  # the remaining chunks have no text
            return
        self._connection.execute("DELETE FROM texts WHERE digest = ?", [row[0]])
        self._drop_reference(row[1])

    def _total_bytes(self) -> int:
        """Return the bytes of all texts. Counts them again if the stored total is invalid."""
        rows = self._connection.execute("SELECT n_bytes FROM text_total").fetchall()
        if len(rows) == 1 and isinstance(rows[0][0], int) and rows[0][0] >= 0:
            return int(rows[0][0])
        self._connection.execute("DELETE FROM text_total")
        self._connection.execute(
            f"INSERT INTO text_total SELECT (SELECT COUNT(*) * {_TEXT_OVERHEAD} FROM texts) + "
            f"(SELECT COUNT(*) * {_CHUNK_OVERHEAD} + COALESCE(SUM(LENGTH(tokens)), 0) FROM text_pieces)"
        )
        return int(self._connection.execute("SELECT n_bytes FROM text_total").fetchone()[0])

    def encrypt_again(self, old: RowCodec) -> None:
        """Store all texts with the codec of this table. `old` is the codec that they were stored with."""
        texts = self._connection.execute("SELECT digest, anchor, n_bytes, head, last_used FROM texts").fetchall()
        chunks = self._connection.execute("SELECT key, parent, tokens, uses FROM text_pieces").fetchall()
        self.clear()
        try:
            for digest, anchor, n_bytes, head, last_used in texts:
                digest, anchor = self._renamed(old, digest, TEXT), self._renamed(old, anchor, ANCHOR)
                head = self._renamed(old, head, CHUNK)
                seal = _row_checksum(digest, n_bytes, head)
                row = (digest, anchor, n_bytes, head, seal, last_used)
                self._connection.execute("INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?)", row)
            for key, parent, stored, uses in chunks:
                name, tokens = self._renamed(old, key, CHUNK), old.decode_tokens(stored, key)
                encoded = self._codec.encode_tokens(tokens, name)
                chunk = (name, self._renamed(old, parent, CHUNK), encoded, uses)
                self._connection.execute("INSERT INTO text_pieces VALUES (?, ?, ?, ?)", chunk)
        except (CacheError, TypeError, ValueError):
            self.clear()  # a row is damaged, and the others may depend on it

    def _renamed(self, old: RowCodec, name: bytes, kind: bytes) -> bytes:
        """Return what stands for a value that had a name in another codec."""
        value = old.value_of(name, kind)
        if value is None:
            raise ValueError("the name is not valid")
        return self._codec.name(value, kind)

    def clear(self) -> None:
        """Remove every text."""
        create_text_tables(self._connection)
        self._found_damage = False


def _row_checksum(digest: bytes, n_bytes: int, head: bytes) -> bytes:
    """Return the checksum of a row. Its tokens are verified by their keys."""
    return hashlib.sha256(digest + n_bytes.to_bytes(8, "little") + head).digest()
