"""Text records in the database of the index: the persistent counterpart of `TextCache`.

    texts        one row per text: digest, anchor, n_bytes, head (the key of its tokens), seal (a checksum),
                 last_used
    text_pieces  token chunks by key, each once; `uses` counts the texts and chunks that refer to it
    text_total   one row: the bytes of both tables, updated by triggers

`Index` owns a `TextTable`. The caller of a method that writes holds a transaction, so that a crash leaves the
tables unchanged, and any number of processes may write. Every row is verified by its checksum, and every chunk by
its key. If one does not match, the lookup finds no text, and the next `remember` empties the tables.
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
    """

    def __init__(self, connection: sqlite3.Connection, read: Read) -> None:
        self._connection, self._read = connection, read
        self._found_damage = False  # a row or a chunk did not match its checksum or key

    def remember(self, record: TextRecord, limit_bytes: int) -> None:
        """Store a text, and evict the least recently used texts until all take at most `limit_bytes`."""
        if self._found_damage:
            self.clear()
        self._total_bytes()  # before triggers add to it, which would turn an invalid value into a number
        chunks = split_tokens(record.tokens)
        head = chain_key(chunks)
        seal = _row_checksum(record.digest, record.n_bytes, head)
        before = self._connection.execute("SELECT head FROM texts WHERE digest = ?", [record.digest]).fetchone()
        self._add_reference(chunks)
        # Not REPLACE, because its deletions run no triggers.
        self._connection.execute(
            "INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
            "(anchor, n_bytes, head, seal, last_used) = "
            "(excluded.anchor, excluded.n_bytes, excluded.head, excluded.seal, excluded.last_used)",
            [record.digest, record.anchor, record.n_bytes, head, seal, time.time_ns()],
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
            "UPDATE texts SET last_used = ?2 WHERE digest = ?1 AND last_used < ?2", list(used)
        )

    def longest(self, digests: TextDigests, longer_than: int) -> TextRecord | None:
        """Return the longest stored text that a text begins with, if it has more than `longer_than` bytes."""
        if not self._read("SELECT 1 FROM texts LIMIT 1", []):
            return None
        anchors = digests.anchors[longer_than // ANCHOR_BYTES :]
        for end in range(len(anchors), 0, -_MAX_PARAMETERS):
            rows = self._select_texts("DISTINCT n_bytes", "anchor", anchors[max(0, end - _MAX_PARAMETERS) : end])
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
        rows = self._select_texts("digest, head, seal", "digest", [digest for _, digest in candidates])
        stored = {digest: (head, seal) for digest, head, seal in rows}
        for n_bytes, digest in candidates:
            head, seal = stored.get(digest, (None, None))
            if head is None:
                continue
            # The length of the prefix with this digest, and not the one in the row, which may be wrong.
            if not isinstance(head, bytes) or seal != _row_checksum(digest, n_bytes, head):
                self._found_damage = True
                continue
            tokens = self._tokens(head)
            if tokens is not None:
                return TextRecord(digest, digests.anchors[n_bytes // ANCHOR_BYTES], n_bytes, tokens)
        return None

    def _tokens(self, head: bytes) -> NDArray[np.int32] | None:
        """Return the tokens of a key; None if a chunk is missing, which may happen at any time, or damaged."""
        parts = []
        while head != ROOT:
            rows = self._read("SELECT parent, tokens FROM text_pieces WHERE key = ?", [head])
            if not rows:
                return None
            chunk = TokenChunk(head, *rows[0])
            if not chunk.is_sound:
                self._found_damage = True
                return None
            parts.append(chunk.tokens)
            head = chunk.parent
        return join_tokens(parts[::-1])

    # --- writing -------------------------------------------------------------------------------

    def _add_reference(self, chunks: list[TokenChunk]) -> None:
        """Store the missing chunks, and add a reference to the last chunk."""
        missing: list[TokenChunk] = []
        for chunk in reversed(chunks):
            if self._connection.execute("SELECT 1 FROM text_pieces WHERE key = ?", [chunk.key]).fetchone():
                break
            missing.append(chunk)
        self._connection.executemany(
            "INSERT INTO text_pieces VALUES (?, ?, ?, 1)", [tuple(chunk) for chunk in reversed(missing)]
        )
        stays = missing[-1].parent if missing else chain_key(chunks)
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

    def clear(self) -> None:
        """Remove every text."""
        create_text_tables(self._connection)
        self._found_damage = False


def _row_checksum(digest: bytes, n_bytes: int, head: bytes) -> bytes:
    """Return the checksum of a row. Its tokens are verified by their keys."""
    return hashlib.sha256(digest + n_bytes.to_bytes(8, "little") + head).digest()
