"""Manifests: lists of what machines stored in a remote tier and removed from it, as objects beside the blocks.

A segment is an object that is written once: zlib over its entries, encrypted if the tier is, and signed. Of two
entries of a block, the later one counts, so segments may be read in any order, twice, and merged by any machine.
docs/fleet/remote-tier.md specifies the format.
"""

from __future__ import annotations

import enum
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import xxhash

from erllama.cache.blocks.block import MAX_POSITION, Block, SaveReason
from erllama.cache.blocks.encryption import SEAL_OVERHEAD
from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES
from erllama.cache.blocks.kvc import MAX_TOKENS
from erllama.cache.remote.object_codec import NO_KEY, ObjectCodec
from erllama.cache.remote.signatures import SIGNATURE_BYTES
from erllama.errors import CacheFormatError

PREFIX = "manifests"
VERSION = 1
ENCRYPTED_VERSION = 2  # whose stored blocks have the id of their key
MAX_ENTRIES = 4096  # of one segment, which then has about 4 MB with blocks of 256 tokens
_MAX_RAW_BYTES = 64 << 20  # what a segment may have when it is unpacked: limits what a damaged one can take
FULL_BYTES = _MAX_RAW_BYTES // 2  # of a segment that is written, unpacked, so that any release reads it
MAX_SEGMENT_BYTES = _MAX_RAW_BYTES + SEAL_OVERHEAD + SIGNATURE_BYTES
_LEVEL = 1  # token ids hardly compress, and the rest does at any level
_NAME = re.compile(rf"{PREFIX}/([0-9a-f]{{16}})-([0-9a-f]{{8}})-(\d{{1,6}})(?:-([0-9a-f]{{16}}))?")

_HEAD = struct.Struct("<I")  # version
# Of each entry: what happened, and when in ns since 1970. A key follows, or the fields of a stored block.
_ENTRY = struct.Struct("<BQ")
# last use, bytes, version, reason, start, slice_end, number of tokens, namespace, parent, recipe; then the id of
# the key, if the segment is encrypted, and the tokens.
_STORED = struct.Struct("<QQ8sIQQI32s32s16s")


class Event(enum.IntEnum):
    """What happened to a block. The numbers are part of the format."""

    STORED = 1
    REMOVED = 2
    USED = 3


class Entry(NamedTuple):
    """What happened to one block.

    Attributes:
        at: when, in ns since 1970; of `USED`, the use itself.
        key: the block's key.
        block: the block, if it was stored; None otherwise.
        n_bytes: bytes of its object.
        version: 8 bytes that name this version of the block; see `version_of`.
        used: its last use when it was stored, in ns since 1970.
        key_id: of the key that encrypts its object; empty for none.
        object_name: the name of its object; "" if this machine lacks the key. The entry then stays in the
            manifests, and the block is hidden.
    """

    event: Event
    at: int
    key: bytes
    block: Block | None = None
    n_bytes: int = 0
    version: bytes = b""
    used: int = 0
    key_id: bytes = NO_KEY
    object_name: str = ""

    @property
    def readable(self) -> bool:
        """Whether it is of a stored block whose object this machine can read."""
        return self.object_name != ""

    @property
    def hidden(self) -> bool:
        """Whether it is of a stored block whose key this machine lacks."""
        return self.block is not None and not self.object_name


class SegmentName(NamedTuple):
    """The parts of the name of a segment.

    Attributes:
        key_id: of the key that encrypts it; empty for none.
    """

    writer: str
    number: int
    n_entries: int
    key_id: bytes = NO_KEY

    def __str__(self) -> str:
        plain = f"{PREFIX}/{self.writer}-{self.number:08x}-{self.n_entries}"
        return f"{plain}-{self.key_id.hex()}" if self.key_id else plain


def parse_name(name: str) -> SegmentName | None:
    """Return the parts of a segment's name; None if the name is not one of a segment."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return SegmentName(found[1], int(found[2], 16), int(found[3]), bytes.fromhex(found[4] or ""))


def raw_bytes(entry: Entry) -> int:
    """Return the bytes of an entry in a segment, unpacked."""
    if entry.block is None:
        return _ENTRY.size + KEY_BYTES
    return _ENTRY.size + _STORED.size + len(entry.key_id) + entry.block.n_tokens * TOKEN_BYTES


def split(entries: Iterable[Entry]) -> Iterator[Sequence[Entry]]:
    """Yield the entries in parts that fit into one segment each."""
    part: list[Entry] = []
    n_bytes = 0
    for entry in entries:
        n_entry = raw_bytes(entry)
        if part and (len(part) >= MAX_ENTRIES or n_bytes + n_entry > FULL_BYTES):
            yield part
            part, n_bytes = [], 0
        part.append(entry)
        n_bytes += n_entry
    if part:
        yield part


def encode(entries: Iterable[Entry], codec: ObjectCodec) -> list[bytes]:
    """Return the content of a segment, as its parts.

    Raises:
        ValueError: no machine could read so large a segment; see `split`.
    """
    pieces = [_HEAD.pack(ENCRYPTED_VERSION if codec.key_id else VERSION)]
    for entry in entries:
        pieces.append(_ENTRY.pack(entry.event, entry.at))
        block = entry.block
        if block is None:
            pieces.append(entry.key)
            continue
        fixed = (entry.used, entry.n_bytes, entry.version, block.reason, block.start, block.slice_end)
        pieces.append(_STORED.pack(*fixed, block.n_tokens, block.namespace, block.parent, block.recipe))
        pieces.append(entry.key_id)
        pieces.append(block.tokens)
    raw = b"".join(pieces)
    if len(raw) > _MAX_RAW_BYTES:
        raise ValueError(f"a segment of {len(raw)} bytes; it may have {_MAX_RAW_BYTES}")
    return codec.encode_segment(zlib.compress(raw, _LEVEL))


def decode(content: memoryview, codec: ObjectCodec) -> list[Entry]:
    """Return the entries of a segment.

    Raises:
        CacheFormatError: it is not signed with a key of this machine, or is not a segment of a version that this
            release reads.
        CacheKeyError: it is encrypted with a key that this machine lacks.
    """
    packed = codec.decode_segment(content)
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(packed, _MAX_RAW_BYTES)
        if not unpacking.eof:
            raise CacheFormatError(f"the segment is cut off, or has more than {_MAX_RAW_BYTES} bytes")
        return list(_entries(raw, codec))
    except (zlib.error, struct.error, ValueError) as error:
        raise CacheFormatError(f"the segment is not valid: {error}") from None


def _entries(raw: bytes, codec: ObjectCodec) -> Iterator[Entry]:
    (version,) = _HEAD.unpack_from(raw)
    expected = ENCRYPTED_VERSION if codec.key_id else VERSION
    if version != expected:
        raise CacheFormatError(f"version {version} of a manifest; version {expected} is expected")
    n_key = len(codec.key_id)
    position = _HEAD.size
    while position < len(raw):
        number, at = _ENTRY.unpack_from(raw, position)
        event = Event(number)
        position += _ENTRY.size
        if event is not Event.STORED:
            key = raw[position : position + KEY_BYTES]
            if len(key) != KEY_BYTES:
                raise CacheFormatError("the segment ends within an entry")
            position += KEY_BYTES
            yield Entry(event, at, key)
            continue
        used, n_bytes, digest, reason, start, slice_end, n_tokens, namespace, parent, recipe = _STORED.unpack_from(
            raw, position
        )
        position += _STORED.size
        key_id = raw[position : position + n_key]
        position += n_key
        tokens = raw[position : position + n_tokens * TOKEN_BYTES]
        position += len(tokens)
        if not 0 < n_tokens <= MAX_TOKENS or len(tokens) != n_tokens * TOKEN_BYTES:
            raise CacheFormatError("the segment ends within an entry")
        if max(start, slice_end, n_bytes) >= MAX_POSITION:
            raise CacheFormatError("a number of the segment is out of range")
        # The key is computed, so it always matches the tokens.
        block = Block.following(parent, namespace, start, tokens, SaveReason(reason), recipe, slice_end)
        name = codec.name(block, digest, key_id)
        yield Entry(event, at, block.key, block, n_bytes, digest, used, key_id, name)


def version_of(block: Block, payload: memoryview) -> bytes:
    """Return 8 bytes that name a version of a block: its payload, and the fields that its key does not cover."""
    fields = struct.pack("<IQ16s", block.reason, block.slice_end, block.recipe)
    return xxhash.xxh3_64_digest(fields + xxhash.xxh3_128_digest(payload))
