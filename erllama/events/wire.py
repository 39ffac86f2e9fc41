"""The messages of KV events, as vLLM's publisher writes them: msgpack, one array for each batch.

    batch = [timestamp, [event, ...], data_parallel_rank]

An event is a map with `type`. Hashes are unsigned 64-bit integers. Some subscribers refuse unknown fields, so the
maps have exactly the fields that vLLM always writes.
"""

from __future__ import annotations

import msgspec

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class BlockStored(msgspec.Struct, tag=True):
    """Blocks of consecutive tokens became available in a medium.

    Attributes:
        block_hashes: one for each block, in order.
        parent_block_hash: the block before the first one; None at the beginning of a prompt.
        token_ids: the tokens of all blocks.
        block_size: tokens of each block.
        lora_id, lora_name: always None. The adapters of a model are those of all its requests, not of a request's
            choice, and the events report the blocks that they computed.
        medium: "GPU", "CPU" or "DISK".
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks are no longer available in a medium."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """No block is available in any medium."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True):
    """Events in order.

    Attributes:
        ts: seconds since 1970.
        events: the events.
        data_parallel_rank: always 0: a replica is one engine.
    """

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(EventBatch)


def encode(batch: EventBatch) -> bytes:
    """Return a batch as msgpack."""
    return _encoder.encode(batch)


def decode(payload: bytes) -> EventBatch:
    """Return the batch that `encode` was called on.

    Raises:
        msgspec.MsgspecError: the bytes are not a batch.
    """
    return _decoder.decode(payload)


def sequence_bytes(number: int) -> bytes:
    """Return a sequence number as its frame: 8 bytes, big-endian."""
    return number.to_bytes(8, "big")
