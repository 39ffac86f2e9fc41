"""KV events in the format that vLLM publishes, as replicas send them: decoded and checked.

A message has three frames: a topic, an 8-byte big-endian sequence number, and a msgpack array of a timestamp, a
list of events, and a data-parallel rank. Each event is a map with its `type`.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from erllama.errors import Error


class KvEventError(Error):
    """A message is not one of KV events."""


class _Event(Struct, frozen=True, tag_field="type", tag=True):
    """An event. Fields that this version does not know are ignored."""


class BlockStored(_Event, frozen=True):
    """A replica has stored blocks that follow each other.

    Attributes:
        block_hashes: of the blocks, in order; integers of 64 bits.
        parent_block_hash: of the block before them; None for the beginning of a prompt.
        token_ids: of all blocks.
        block_size: tokens per block.
        medium: "GPU", "CPU" or "DISK"; None for "GPU".
        lora_id, lora_name: of the adapter that the blocks were computed with; None without one.
    """

    block_hashes: tuple[int, ...]
    token_ids: tuple[int, ...]
    block_size: int
    parent_block_hash: int | None = None
    medium: str | None = None
    lora_id: int | None = None
    lora_name: str | None = None

    @property
    def is_of_adapter(self) -> bool:
        """Whether the blocks were computed with an adapter."""
        return self.lora_id is not None or self.lora_name is not None


class BlockRemoved(_Event, frozen=True):
    """A replica has removed blocks from a medium; from all if it names none."""

    block_hashes: tuple[int, ...]
    medium: str | None = None


class AllBlocksCleared(_Event, frozen=True):
    """A replica has cleared its cache."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(Struct, frozen=True, array_like=True):
    """A message of events."""

    timestamp: float
    events: tuple[KvEvent, ...]
    rank: int | None = None


_decoder = msgspec.msgpack.Decoder(_Batch)


def decode_batch(payload: bytes) -> tuple[KvEvent, ...]:
    """Return the events of a message.

    Args:
        payload: its third frame.

    Raises:
        KvEventError: it is not a message of events.
    """
    try:
        return _decoder.decode(payload).events
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise KvEventError(f"a message of KV events cannot be read: {error}") from None


def encode_batch(timestamp: float, events: tuple[KvEvent, ...], rank: int = 0) -> bytes:
    """Return the third frame of a message."""
    return msgspec.msgpack.encode(_Batch(timestamp, events, rank))
