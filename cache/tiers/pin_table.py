"""Pins in the database of the index: one row per pin, with the keys of the blocks that it protects.

    pins    seq, name, model, model_key, n_tokens, blocks (see `pack_blocks`), created, expires

With a key, `name` is an encrypted name, and `blocks` has all other columns but the times, encrypted. `Index` owns a
`PinTable`. The caller of a method that writes holds a transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from erllama.cache.blocks.keys import KEY_BYTES
from erllama.cache.blocks.pins import PinRecord
from erllama.cache.tiers.row_codec import PinColumns, RowCodec
from erllama.errors import CacheError

Read = Callable[[str, list[Any]], list[tuple[Any, ...]]]


class _Row(NamedTuple):
    """A row: its number, and its pin; None if the row is not as it was written."""

    seq: int
    pin: PinRecord | None


class PinTable:
    """The table of pins in one database.

    Args:
        connection: connection for writes, within a transaction of the caller.
        codec: of the index.
    """

    def __init__(self, connection: sqlite3.Connection, codec: RowCodec) -> None:
        self._connection, self._codec = connection, codec
        self._state: tuple[int, int] | None = None  # number of pins and largest seq at the last `changed`

    def changed(self, read: Read) -> list[PinRecord] | None:
        """Return all pins; None if there was no change since the last call.

        Args:
            read: runs a query. It may return no row instead of waiting. The next call then reads again.
        """
        states = read("SELECT count(*), coalesce(max(seq), 0) FROM pins", [])
        if not states or states[0] == self._state:
            return None
        rows = self._rows(read)
        if len(rows) != states[0][0]:  # the second query would have waited, or another process wrote in between
            return None
        self._state = states[0]
        return [row.pin for row in rows if row.pin is not None]

    def all(self, read: Read) -> list[PinRecord]:
        """Return all pins, expired ones included. Skips rows that are not as they were written."""
        return [row.pin for row in self._rows(read) if row.pin is not None]

    def damaged(self, read: Read) -> list[int]:
        """Return the numbers of the rows that are not as they were written.

        The other rows of the index do not depend on them.
        """
        return [row.seq for row in self._rows(read) if row.pin is None]

    def remove_rows(self, numbers: Iterable[int]) -> None:
        """Remove rows by their numbers."""
        self._connection.executemany("DELETE FROM pins WHERE seq = ?", [(number,) for number in numbers])

    def put(self, pin: PinRecord) -> None:
        """Store a pin. Replaces one of the same name."""
        self.remove(pin.name)
        self._connection.execute(
            "INSERT INTO pins (name, model, model_key, n_tokens, blocks, created, expires) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [*self._codec.encode_pin(pin), pin.created, pin.expires],
        )

    def replace_all(self, pins: Iterable[PinRecord]) -> None:
        """Remove all rows, and store these pins."""
        self._connection.execute("DELETE FROM pins")
        for pin in pins:
            self.put(pin)

    def remove(self, name: str) -> bool:
        """Remove a pin. Return False if no pin has this name."""
        return (
            self._connection.execute("DELETE FROM pins WHERE name = ?", [self._codec.pin_name(name)]).rowcount > 0
        )

    def remove_expired(self, now: float) -> None:
        """Remove the pins that have ended at a time, in seconds since 1970."""
        self._connection.execute("DELETE FROM pins WHERE expires <= ?", [now])

    def _rows(self, read: Read) -> list[_Row]:
        # Text that is not UTF-8 would make the whole query fail.
        name, model = (
            f"CASE typeof({each}) WHEN 'text' THEN CAST({each} AS BLOB) END" for each in ("name", "model")
        )
        columns = f"{name}, {model}, model_key, n_tokens, blocks, created, expires"
        found = read(f"SELECT seq, {columns} FROM pins ORDER BY seq", [])
        return [_Row(seq, self._record(*row)) for seq, *row in found]

    def _record(
        self,
        name: bytes,
        model: bytes,
        model_key: bytes,
        n_tokens: int,
        blocks: bytes,
        created: float,
        expires: float | None,
    ) -> PinRecord | None:
        """Return the pin of a row; None if the row is not as it was written."""
        try:
            columns = PinColumns(str(name, "utf-8"), str(model, "utf-8"), model_key, n_tokens, blocks)
            pin = self._codec.decode_pin(columns, created, expires)
            sound = (
                len(pin.model_key) == KEY_BYTES
                and pin.n_tokens > 0
                and all(isinstance(value, float) for value in (created, 0.0 if expires is None else expires))
            )
        except (TypeError, ValueError, CacheError):
            sound = False
        return pin if sound else None
