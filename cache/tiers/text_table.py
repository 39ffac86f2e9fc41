"""Texts and their tokens in the index's database: what `KnownTexts` has in memory, on disk.

    texts        one row a text: digest, anchor, n_bytes, head (the key of its tokens), seal, last_used
    text_pieces  tokens in pieces, by key, each once; `uses` counts the texts and pieces that need it
    text_total   one row: what all of that takes, kept by triggers

The caller of what writes holds a transaction, so that a crash leaves all of it
as it was, and any number of processes may write. A row is believed where it fits
its seal, and a piece where it fits its key; where one does not, nothing is found,
and the texts are forgotten with the next that is remembered.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erllama.cache.texts.text_tokens import CHUNK_BYTES, KnownText, TextDigests
from erllama.cache.texts.token_chain import ROOT, Piece, head_of, pieces_of, tokens_of

_MOST_PARAMETERS = 500  # of a query; SQLite takes 999 and more
# What a row takes beside tokens, with its entries in indexes and what stays free of pages.
_TEXT_OVERHEAD, _PIECE_OVERHEAD = 300, 250

Read = Callable[[str, list[Any]], list[tuple[Any, ...]]]


def create_text_tables(connection: sqlite3.Connection) -> None:
    """Make the tables, empty; those of an earlier release go."""
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
            ("text_pieces", f"{_PIECE_OVERHEAD} + LENGTH({side}.tokens)"),
        ):
            connection.execute(
                f"CREATE TRIGGER {table}_{event.lower()} AFTER {event} ON {table} "
                f"BEGIN UPDATE text_total SET n_bytes = n_bytes {sign} ({size}); END"
            )


class TextTable:
    """The tables of one database.

    Args:
        connection: to write; its user has a transaction.
        read: runs a query on what is committed, from any thread, and waits for nobody.
    """

    def __init__(self, connection: sqlite3.Connection, read: Read) -> None:
        self._connection, self._read = connection, read
        self._contradicted = False  # something was read that is not what was written

    def remember(self, known: KnownText, limit_bytes: int) -> None:
        """Note a text; the least recently used go where all take more than `limit_bytes`."""
        if self._contradicted:
            self.clear()
        self._total()  # before triggers add to it: what is no number would pass for one
        pieces = pieces_of(known.tokens)
        head = head_of(pieces)
        seal = _seal(known.digest, known.n_bytes, head)
        before = self._connection.execute("SELECT head FROM texts WHERE digest = ?", [known.digest]).fetchone()
        self._hold(pieces)
        # No REPLACE: the triggers would not hear of what it deletes.
        self._connection.execute(
            "INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
            "(anchor, n_bytes, head, seal, last_used) = "
            "(excluded.anchor, excluded.n_bytes, excluded.head, excluded.seal, excluded.last_used)",
            [known.digest, known.anchor, known.n_bytes, head, seal, time.time_ns()],
        )
        if before is not None:
            self._release(before[0])
        if self._total() > limit_bytes:
            self._clamp_uses()
        while self._total() > limit_bytes:
            self._forget_oldest()

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        """Note when texts were last used: pairs of digest and ns since 1970."""
        self._clamp_uses()
        self._connection.executemany(
            "UPDATE texts SET last_used = ?2 WHERE digest = ?1 AND last_used < ?2", list(used)
        )

    def longest(self, digests: TextDigests, longer_than: int) -> KnownText | None:
        """The longest text noted that another begins with, if longer than so many bytes."""
        if not self._read("SELECT 1 FROM texts LIMIT 1", []):
            return None
        anchors = digests.anchors[longer_than // CHUNK_BYTES :]
        for end in range(len(anchors), 0, -_MOST_PARAMETERS):
            rows = self._among("DISTINCT n_bytes", "anchor", anchors[max(0, end - _MOST_PARAMETERS) : end])
            lengths = {row[0] for row in rows if isinstance(row[0], int) and row[0] > longer_than}
            candidates = digests.of(lengths)
            for at in range(0, len(candidates), _MOST_PARAMETERS):
                found = self._first(candidates[at : at + _MOST_PARAMETERS], digests)
                if found is not None:
                    return found
        return None

    # --- reading -------------------------------------------------------------------------------

    def _among(self, columns: str, column: str, values: list[bytes]) -> list[tuple[Any, ...]]:
        marks = ", ".join("?" * len(values))
        return self._read(f"SELECT {columns} FROM texts WHERE {column} IN ({marks})", values)

    def _first(self, candidates: list[tuple[int, bytes]], digests: TextDigests) -> KnownText | None:
        """The first of these lengths and digests that is known."""
        rows = self._among("digest, head, seal", "digest", [digest for _, digest in candidates])
        known = {digest: (head, seal) for digest, head, seal in rows}
        for n_bytes, digest in candidates:
            head, seal = known.get(digest, (None, None))
            if head is None:
                continue
            # The length is the one at which the text asked about has this digest, and not what the row says.
            if not isinstance(head, bytes) or seal != _seal(digest, n_bytes, head):
                self._contradicted = True
                continue
            tokens = self._tokens(head)
            if tokens is not None:
                return KnownText(digest, digests.anchors[n_bytes // CHUNK_BYTES], n_bytes, tokens)
        return None

    def _tokens(self, head: bytes) -> NDArray[np.int32] | None:
        """What is stored under a key; None where some of it is gone, as may happen any moment, or is not sound."""
        parts = []
        while head != ROOT:
            rows = self._read("SELECT parent, tokens FROM text_pieces WHERE key = ?", [head])
            if not rows:
                return None
            piece = Piece(head, *rows[0])
            if not piece.is_sound:
                self._contradicted = True
                return None
            parts.append(piece.tokens)
            head = piece.parent
        return tokens_of(parts[::-1])

    # --- writing -------------------------------------------------------------------------------

    def _hold(self, pieces: list[Piece]) -> None:
        """Have pieces stored, and the last of them needed once more."""
        missing: list[Piece] = []
        for piece in reversed(pieces):
            if self._connection.execute("SELECT 1 FROM text_pieces WHERE key = ?", [piece.key]).fetchone():
                break
            missing.append(piece)
        self._connection.executemany(
            "INSERT INTO text_pieces VALUES (?, ?, ?, 1)", [tuple(piece) for piece in reversed(missing)]
        )
        stays = missing[-1].parent if missing else head_of(pieces)
        self._connection.execute("UPDATE text_pieces SET uses = uses + 1 WHERE key = ?", [stays])

    def _release(self, head: bytes) -> None:
        """Undo one `_hold`; what nobody else needs goes."""
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
        """A use in the future was noted by a clock that was ahead."""
        self._connection.execute("UPDATE texts SET last_used = ?1 WHERE last_used > ?1", [time.time_ns()])

    def _forget_oldest(self) -> None:
        row = self._connection.execute("SELECT digest, head FROM texts ORDER BY last_used LIMIT 1").fetchone()
        if row is None:
            self.clear()  # what is left over belongs to nothing
            return
        self._connection.execute("DELETE FROM texts WHERE digest = ?", [row[0]])
        self._release(row[1])

    def _total(self) -> int:
        """What all of it takes; counted anew where that is not what triggers can have left."""
        rows = self._connection.execute("SELECT n_bytes FROM text_total").fetchall()
        if len(rows) == 1 and isinstance(rows[0][0], int) and rows[0][0] >= 0:
            return int(rows[0][0])
        self._connection.execute("DELETE FROM text_total")
        self._connection.execute(
            f"INSERT INTO text_total SELECT (SELECT COUNT(*) * {_TEXT_OVERHEAD} FROM texts) + "
            f"(SELECT COUNT(*) * {_PIECE_OVERHEAD} + COALESCE(SUM(LENGTH(tokens)), 0) FROM text_pieces)"
        )
        return int(self._connection.execute("SELECT n_bytes FROM text_total").fetchone()[0])

    def clear(self) -> None:
        """Forget every text."""
        create_text_tables(self._connection)
        self._contradicted = False


def _seal(digest: bytes, n_bytes: int, head: bytes) -> bytes:
    """What tells that a row is as it was written; its tokens are told by their key."""
    return hashlib.sha256(digest + n_bytes.to_bytes(8, "little") + head).digest()
