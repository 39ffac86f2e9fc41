"""Manifests: lists of what machines stored in a remote tier and removed from it, as objects beside the blocks.

A segment is an object that is written once: zlib over its entries, signed. Of two entries of a block, the later one
counts, so segments may be read in any order, twice, and merged by any machine. docs/fleet/remote-tier.md specifies
the format.
"""

from __future__ import annotations

import enum
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from erllama.cache.blocks.block import MAX_POSITION, Block, SaveReason
from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES
from erllama.cache.blocks.kvc import MAX_TOKENS
from erllama.cache.remote.signatures import SIGNATURE_BYTES, Signer
from erllama.errors import CacheFormatError

PREFIX = "manifests"
KIND = "manifest"
VERSION = 1
MAX_ENTRIES = 4096  # of one segment, which then has about 4 MB with blocks of 256 tokens
_MAX_RAW_BYTES = 64 << 20  # what a segment may have when it is unpacked: limits what a damaged one can take
MAX_SEGMENT_BYTES = _MAX_RAW_BYTES + SIGNATURE_BYTES
_LEVEL = 1  # token ids hardly compress, and the rest does at any level
_NAME = re.compile(rf"{PREFIX}/([0-9a-f]{{16}})-([0-9a-f]{{8}})-(\d{{1,6}})")

_HEAD = struct.Struct("<I")  # version
# Of each entry: what happened, and when in ns since 1970. A key follows, or the fields of a stored block.
_ENTRY = struct.Struct("<BQ")
# last use, bytes, version, reason, start, slice_end, number of tokens, namespace, parent, recipe; then the tokens.
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
    """

    event: Event
    at: int
    key: bytes
    block: Block | None = None
    n_bytes: int = 0
    version: bytes = b""
    used: int = 0

    @property
    def object_name(self) -> str:
        """The name of the object of a stored block."""
        assert self.block is not None
        return f"blocks/{self.block.namespace.hex()[:16]}/{self.key.hex()}-{self.version.hex()}"


class SegmentName(NamedTuple):
    """The parts of the name of a segment."""

    writer: str
    number: int
    n_entries: int

    def __str__(self) -> str:
        return f"{PREFIX}/{self.writer}-{self.number:08x}-{self.n_entries}"


def parse_name(name: str) -> SegmentName | None:
    """Return the parts of a segment's name; None if the name is not one of a segment."""
    found = _NAME.fullmatch(name)
    return SegmentName(found[1], int(found[2], 16), int(found[3])) if found else None


def encode(entries: Iterable[Entry], signer: Signer) -> list[bytes]:
    """Return the content of a segment, as its parts."""
    pieces = [_HEAD.pack(VERSION)]
    for entry in entries:
        pieces.append(_ENTRY.pack(entry.event, entry.at))
        block = entry.block
        if block is None:
            pieces.append(entry.key)
            continue
        fixed = (entry.used, entry.n_bytes, entry.version, block.reason, block.start, block.slice_end)
        pieces.append(_STORED.pack(*fixed, block.n_tokens, block.namespace, block.parent, block.recipe))
        pieces.append(block.tokens)
    packed = zlib.compress(b"".join(pieces), _LEVEL)
    return [signer.sign(KIND, [packed]), packed]


def decode(content: memoryview, signer: Signer) -> list[Entry]:
    """Return the entries of a segment.

    Raises:
        CacheFormatError: it is not signed with a key of this machine, or is not a segment of a version that this
            release reads.
    """
    packed = signer.open(KIND, content)
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(packed, _MAX_RAW_BYTES)
        if not unpacking.eof:
            raise CacheFormatError(f"the segment is cut off, or has more than {_MAX_RAW_BYTES} bytes")
        return list(_entries(raw))
    except (zlib.error, struct.error, ValueError) as error:
        raise CacheFormatError(f"the segment is not valid: {error}") from None


def _entries(raw: bytes) -> Iterator[Entry]:
    (version,) = _HEAD.unpack_from(raw)
    if version != VERSION:
        raise CacheFormatError(f"version {version} of a manifest; this release reads version {VERSION}")
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
        tokens = raw[position : position + n_tokens * TOKEN_BYTES]
        position += len(tokens)
        if not 0 < n_tokens <= MAX_TOKENS or len(tokens) != n_tokens * TOKEN_BYTES:
            raise CacheFormatError("the segment ends within an entry")
        if max(start, slice_end, n_bytes) >= MAX_POSITION:
            raise CacheFormatError("a number of the segment is out of range")
        # The key is computed, so it always matches the tokens.
        block = Block.following(parent, namespace, start, tokens, SaveReason(reason), recipe, slice_end)
        yield Entry(event, at, block.key, block, n_bytes, digest, used)


def version_of(block: Block, payload: memoryview) -> bytes:
    """Return 8 bytes that name a version of a block: its payload, and the fields that its key does not cover."""
    fields = struct.pack("<IQ16s", block.reason, block.slice_end, block.recipe)
    return xxhash.xxh3_64_digest(fields + xxhash.xxh3_128_digest(payload))
