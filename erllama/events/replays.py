"""Replays: the batches that a subscriber has missed, sent again on its request.

A `ReplayBuffer` keeps the last batches. A request for older ones gets a snapshot instead: a batch that clears all
blocks, and batches with all blocks. A `Replay` is the answer to one request. It is sent in parts, so that a slow
subscriber delays neither the events nor other replays. The publisher's thread owns all of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from erllama.events.published import Located, PublishedBlocks
from erllama.events.wire import END_OF_REPLAY, AllBlocksCleared, Event, EventBatch, encode, sequence_bytes

# Blocks of the cache in one batch of a snapshot: a few thousand tokens.
_SNAPSHOT_BLOCKS = 32


class Batch(NamedTuple):
    """A batch that was sent: its sequence number, and its msgpack."""

    number: int
    payload: bytes


class ReplayBuffer:
    """The last batches that were sent.

    Args:
        max_batches, max_bytes: limits. The oldest batches are dropped beyond them.
    """

    def __init__(self, max_batches: int, max_bytes: int) -> None:
        self._max_batches, self._max_bytes = max_batches, max_bytes
        self._batches: deque[Batch] = deque()
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch) -> None:
        """Keep a batch, and drop the oldest ones beyond the limits."""
        self._batches.append(batch)
        self.n_bytes += len(batch.payload)
        while self._batches and (len(self._batches) > self._max_batches or self.n_bytes > self._max_bytes):
            self.n_bytes -= len(self._batches.popleft().payload)

    def since(self, number: int) -> list[Batch] | None:
        """Return the batches from a sequence number on; None if the buffer has dropped some of them."""
        if not self._batches or number < self._batches[0].number:
            return None
        return [batch for batch in self._batches if batch.number >= number]


class Replay:
    """The answer to one request: batches with rising sequence numbers, and the mark of the end.

    Args:
        client: the frame that identifies the subscriber.
        topic: the topic of the events.
        batches: the batches to send; made as they are sent.
    """

    def __init__(self, client: bytes, topic: bytes, batches: Iterator[Batch]) -> None:
        self.client, self._topic = client, topic
        self._batches = batches
        self._next: tuple[bytes, ...] | None = None
        self._at_end = False
        self.ended = False  # the mark of the end was sent, or the subscriber has gone
        self.last_sent = time.monotonic()

    def frames(self) -> tuple[bytes, ...]:
        """Return the next message. Returns the same one until `sent` is called."""
        if self._next is None:
            batch = next(self._batches, None)
            number, payload = (END_OF_REPLAY, b"") if batch is None else (sequence_bytes(batch[0]), batch[1])
            self._at_end = batch is None
            self._next = (self.client, b"", self._topic, number, payload)
        return self._next

    def sent(self) -> bool:
        """Continue with the message after the one that `frames` returned. Return whether it was the last one."""
        self._next, self.ended = None, self._at_end
        self.last_sent = time.monotonic()
        return self.ended


def payloads(
    blocks: PublishedBlocks, located: Sequence[Located], per_batch: int = _SNAPSHOT_BLOCKS
) -> Iterator[bytes]:
    """Yield the batches that replace everything a subscriber knows by these blocks; at least one.

    Args:
        blocks: makes the events.
        located: as of `PublishedBlocks.located`.
        per_batch: blocks in one batch.
    """
    for at in range(0, max(len(located), 1), per_batch):
        events: list[Event] = [] if at else [AllBlocksCleared()]
        for each in located[at : at + per_batch]:
            blocks.append_stored(events, each)
        yield encode(EventBatch(time.time(), events))


def snapshot(blocks: PublishedBlocks, located: Sequence[Located], first: int, last: int) -> Iterator[Batch]:
    """Return the batches of `payloads` with rising sequence numbers that end with `last`.

    Args:
        located: all blocks, at the time of the batch `last`.
        first: the sequence number that the subscriber asked for. No batch has a lower one.
        last: the last sequence number that was sent.
    """
    available = last - first + 1
    per_batch = max(_SNAPSHOT_BLOCKS, -(-len(located) // available))
    n_batches = max(-(-len(located) // per_batch), 1)
    return map(Batch, range(last - n_batches + 1, last + 1), payloads(blocks, located, per_batch))
