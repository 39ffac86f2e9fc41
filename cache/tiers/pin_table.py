"""Pins in the database of the index: one row per pin, with the keys of the blocks that it protects.

    pins    seq, name, model, model_key, n_tokens, blocks (see `pack_blocks`), created, expires

`Index` owns a `PinTable`. The caller of a method that writes holds a transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from erllama.cache.blocks.keys import KEY_BYTES
from erllama.cache.blocks.pins import PinRecord, pack_blocks, unpack_blocks

Read = Callable[[str, list[Any]], list[tuple[Any, ...]]]


class _Row(NamedTuple):
    """A row: its number, and its pin; None if the row is not as it was written."""

    seq: int
    pin: PinRecord | None


class PinTable:
    """The table of pins in one database.

    Args:
        connection: connection for writes, within a transaction of the caller.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._state: tuple[int, int] | None = None  # number of pins and largest seq at the last `changed`

    def changed(self, read: Read) -> list[PinRecord] | None:
        """Return all pins; None if there was no change since the last call.

        Args:
            read: runs a query. It may return no row instead of waiting. The next call then reads again.
        """
        states = read("SELECT count(*), coalesce(max(seq), 0) FROM pins", [])
        if not states or states[0] == self._state:
            return None
        rows = _rows(read)
        if len(rows) != states[0][0]:  # the second query would have waited, or another process wrote in between
            return None
        self._state = states[0]
        return [row.pin for row in rows if row.pin is not None]

    def all(self, read: Read) -> list[PinRecord]:
        """Return all pins, expired ones included. Skips rows that are not as they were written."""
        return [row.pin for row in _rows(read) if row.pin is not None]

    def damaged(self, read: Read) -> list[int]:
        """Return the numbers of the rows that are not as they were written.

        The other rows of the index do not depend on them.
        """
        return [row.seq for row in _rows(read) if row.pin is None]

    def remove_rows(self, numbers: Iterable[int]) -> None:
        """Remove rows by their numbers."""
        self._connection.executemany("DELETE FROM pins WHERE seq = ?", [(number,) for number in numbers])

    def put(self, pin: PinRecord) -> None:
        """Store a pin. Replaces one of the same name."""
        self.remove(pin.name)
        self._connection.execute(
            "INSERT INTO pins (name, model, model_key, n_tokens, blocks, created, expires) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [pin.name, pin.model, pin.model_key, pin.n_tokens, pack_blocks(pin.blocks), pin.created, pin.expires],
        )

    def remove(self, name: str) -> bool:
        """Remove a pin. Return False if no pin has this name."""
        return self._connection.execute("DELETE FROM pins WHERE name = ?", [name]).rowcount > 0

    def remove_expired(self, now: float) -> None:
        """Remove the pins that have ended at a time, in seconds since 1970."""
        self._connection.execute("DELETE FROM pins WHERE expires <= ?", [now])


def _rows(read: Read) -> list[_Row]:
    # Text that is not UTF-8 would make the whole query fail.
    name, model = (f"CASE typeof({each}) WHEN 'text' THEN CAST({each} AS BLOB) END" for each in ("name", "model"))
    columns = f"{name}, {model}, model_key, n_tokens, blocks, created, expires"
    return [_Row(seq, _record(*row)) for seq, *row in read(f"SELECT seq, {columns} FROM pins ORDER BY seq", [])]


def _record(
    name: bytes, model: bytes, model_key: bytes, n_tokens: int, blocks: bytes, created: float, expires: float | None
) -> PinRecord | None:
    """Return the pin of a row; None if the row is not as it was written."""
    try:
        pin = PinRecord(
            str(name, "utf-8"), str(model, "utf-8"), model_key, n_tokens, unpack_blocks(blocks), created, expires
        )
        sound = (
            len(model_key) == KEY_BYTES
            and n_tokens > 0
            and all(isinstance(value, float) for value in (created, 0.0 if expires is None else expires))
        )
    except (TypeError, ValueError):
        sound = False
    return pin if sound else None
