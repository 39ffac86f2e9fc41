"""How the index stores keys, tokens, texts and pins: as they are, or encrypted.

`RowCodec` leaves them as they are. `EncryptedRows` stores names in place of keys and digests, and encrypts the rest
of a row. Sizes, times of use, positions of text ends and digests of model files are not encrypted. `Index` owns a
codec and passes it to its tables.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from erllama.cache.blocks.block import RECIPE_BYTES, Block, SaveReason
from erllama.cache.blocks.encryption import ContentKey, Encryption
from erllama.cache.blocks.keys import KEY_BYTES, child_key
from erllama.cache.blocks.pins import PinRecord, pack_blocks, unpack_blocks

BLOCK, TEXT, ANCHOR, CHUNK, PIN = b"block", b"text", b"anchor", b"chunk", b"pin"  # kinds of names

# parent, namespace, start, slice end, reason, recipe; then the tokens.
_BLOCK_FIELDS = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sQQI{RECIPE_BYTES}s")
# bytes of the name, bytes of the model's id, key of the model, number of tokens; then name, id and blocks.
_PIN_FIELDS = struct.Struct(f"<II{KEY_BYTES}sQ")


class BlockColumns(NamedTuple):
    """The columns of a block's row that depend on the codec."""

    key: bytes
    parent: bytes
    namespace: bytes
    start: int
    tokens: bytes
    reason: int
    recipe: bytes
    slice_end: int


class PinColumns(NamedTuple):
    """The columns of a pin's row that depend on the codec."""

    name: str
    model: str
    model_key: bytes
    n_tokens: int
    blocks: bytes


class RowCodec:
    """Stores everything as it is."""

    encryption: Encryption | None = None

    def name(self, value: bytes, kind: bytes) -> bytes:
        """Return what stands for a key or a digest in new rows."""
        return value

    def names(self, value: bytes, kind: bytes) -> Sequence[bytes]:
        """Return all that may stand for a key or a digest in rows; that of old keys first."""
        return (value,)

    def value_of(self, name: bytes, kind: bytes) -> bytes | None:
        """Return the key or digest that a name stands for; None if the name is not valid."""
        return name

    def encode_tokens(self, tokens: bytes, name: bytes) -> bytes:
        """Return the tokens of the chunk with a name, as the tables of texts store them."""
        return tokens

    def decode_tokens(self, stored: bytes, name: bytes) -> bytes:
        """Return the tokens that `encode_tokens` was called with.

        Raises:
            CacheFormatError: they were changed.
        """
        return stored

    def encode_block(self, block: Block, content_key: ContentKey | None = None) -> BlockColumns:
        """Return the columns of a block.

        Args:
            content_key: the key that its file is encrypted with; None for the current one.
        """
        return BlockColumns(
            block.key,
            block.parent,
            block.namespace,
            block.start,
            block.tokens,
            int(block.reason),
            block.recipe,
            block.slice_end,
        )

    def decode_block(self, columns: BlockColumns) -> Block:
        """Return the block of a row.

        Raises:
            TypeError, ValueError, CacheError: the row is not as it was written.
        """
        key, parent, namespace, start, tokens, reason, recipe, slice_end = columns
        block = Block(key, parent, namespace, start, tokens, SaveReason(reason), recipe, slice_end)
        if child_key(parent, tokens) != key or min(start, slice_end) < 0:
            raise ValueError("the columns contradict each other")
        return block

    def pin_name(self, name: str) -> str:
        """Return what stands for the name of a pin."""
        return name

    def encode_pin(self, pin: PinRecord) -> PinColumns:
        """Return the columns of a pin."""
        return PinColumns(pin.name, pin.model, pin.model_key, pin.n_tokens, pack_blocks(pin.blocks))

    def decode_pin(self, columns: PinColumns, created: float, expires: float | None) -> PinRecord:
        """Return the pin of a row.

        Raises:
            TypeError, ValueError, CacheError: the row is not as it was written.
        """
        name, model, model_key, n_tokens, blocks = columns
        return PinRecord(name, model, model_key, n_tokens, unpack_blocks(blocks), created, expires)


class EncryptedRows(RowCodec):
    """Stores names in place of keys and digests, and encrypts the rest.

    Args:
        encryption: its keys are those that rows may be encrypted with.
    """

    def __init__(self, encryption: Encryption) -> None:
        self.encryption: Encryption = encryption

    def name(self, value: bytes, kind: bytes) -> bytes:
        return self.encryption.name(value, kind)

    def names(self, value: bytes, kind: bytes) -> Sequence[bytes]:
        # While keys are rotated, the new file of a block is there before the old one is removed. A reader that
        # looks for the old one first finds one of them.
        return self.encryption.names(value, kind)[::-1]

    def value_of(self, name: bytes, kind: bytes) -> bytes | None:
        return self.encryption.value_of(name, kind)

    def encode_tokens(self, tokens: bytes, name: bytes) -> bytes:
        return self.encryption.seal(tokens, CHUNK + name)

    def decode_tokens(self, stored: bytes, name: bytes) -> bytes:
        return self.encryption.open(stored, CHUNK + name)

    def encode_block(self, block: Block, content_key: ContentKey | None = None) -> BlockColumns:
        key = content_key or self.encryption.current
        name = key.name(block.key, BLOCK)
        fields = _BLOCK_FIELDS.pack(
            block.parent, block.namespace, block.start, block.slice_end, block.reason, block.recipe
        )
        return BlockColumns(name, b"", b"", 0, key.seal(fields + block.tokens, BLOCK + name), 0, b"", 0)

    def decode_block(self, columns: BlockColumns) -> Block:
        content = self.encryption.open(columns.tokens, BLOCK + columns.key)
        parent, namespace, start, slice_end, reason, recipe = _BLOCK_FIELDS.unpack_from(content)
        tokens = content[_BLOCK_FIELDS.size :]
        # The name fits this key: whoever encrypted the row with the name had the key of both.
        key = child_key(parent, tokens)
        return Block(key, parent, namespace, start, tokens, SaveReason(reason), recipe, slice_end)

    def pin_name(self, name: str) -> str:
        return self.encryption.name(name.encode(), PIN).hex()

    def encode_pin(self, pin: PinRecord) -> PinColumns:
        name, model = pin.name.encode(), pin.model.encode()
        content = _PIN_FIELDS.pack(len(name), len(model), pin.model_key, pin.n_tokens) + name + model
        stored = self.pin_name(pin.name)
        sealed = self.encryption.seal(content + pack_blocks(pin.blocks), PIN + stored.encode())
        return PinColumns(stored, "", b"", 0, sealed)

    def decode_pin(self, columns: PinColumns, created: float, expires: float | None) -> PinRecord:
        content = self.encryption.open(columns.blocks, PIN + columns.name.encode())
        try:
            n_name, n_model, model_key, n_tokens = _PIN_FIELDS.unpack_from(content)
        except struct.error as error:
            raise ValueError(str(error)) from None
        at = _PIN_FIELDS.size
        name, model = content[at : at + n_name], content[at + n_name : at + n_name + n_model]
        blocks = unpack_blocks(content[at + n_name + n_model :])
        return PinRecord(name.decode(), model.decode(), model_key, n_tokens, blocks, created, expires)


def codec_of(encryption: Encryption | None) -> RowCodec:
    """Return the codec with these keys; None for one that does not encrypt."""
    return RowCodec() if encryption is None else EncryptedRows(encryption)
