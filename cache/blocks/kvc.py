"""Reads and writes .kvc files: one block with its tokens and its payload, with checksums.

docs/kvc-format.md specifies the format. Everything is verified before use: the header by its checksum, the key by
the tokens, the length of the file by the header, and the payload by its checksum. File tiers and archives use this
module.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from erllama.cache.blocks.block import MAX_POSITION, Block, SaveReason
from erllama.cache.blocks.keys import TOKEN_BYTES, child_key
from erllama.errors import CacheFormatError, CacheVersionError

MAGIC = b"\x89KVC\r\n\x1a\n"  # like PNG's: not text, and changed by a copy in text mode
VERSION = 1
SUFFIX = ".kvc"

# magic, version, flags, header bytes, reason, start, slice_end, payload bytes, tokens, reserved,
# namespace, parent, key, recipe, payload checksum; then the tokens and the header's checksum.
_FIXED = struct.Struct("<8sIIIIQQQII32s32s32s16s16s")
_CHECKSUM_BYTES = 16
MAX_TOKENS = 1 << 20  # far above any block size; limits what an invalid header can make a reader read


def header_bytes(n_tokens: int) -> int:
    """Return the length of the header of a block of `n_tokens`, with its checksum."""
    return _FIXED.size + n_tokens * TOKEN_BYTES + _CHECKSUM_BYTES


def encode_header(block: Block, payload: memoryview) -> bytes:
    """Return the header that is written before `payload`."""
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        0,
        header_bytes(block.n_tokens),
        block.reason,
        block.start,
        block.slice_end,
        payload.nbytes,
        block.n_tokens,
        0,
        block.namespace,
        block.parent,
        block.key,
        block.recipe,
        xxhash.xxh3_128_digest(payload),
    )
    body = fixed + block.tokens
    return body + xxhash.xxh3_128_digest(body)


def decode_header(content: memoryview) -> tuple[Block, int, bytes]:
    """Decode the start of a file.

    Returns:
        the block, and the length and the checksum of its payload.

    Raises:
        CacheFormatError: there is no valid header of a version that this release reads.
    """
    if content.nbytes < _FIXED.size:
        raise CacheFormatError(f"{content.nbytes} bytes are too few for a header")
    (
        magic,
        version,
        flags,
        n_header,
        reason,
        start,
        slice_end,
        payload_bytes,
        n_tokens,
        reserved,
        namespace,
        parent,
        key,
        recipe,
        payload_checksum,
    ) = _FIXED.unpack_from(content)
    if magic != MAGIC:
        raise CacheFormatError("not a .kvc file")
    if version != VERSION:
        error = CacheVersionError if version > VERSION else CacheFormatError
        raise error(f"version {version}; this release reads version {VERSION}")
    if n_tokens == 0 or n_tokens > MAX_TOKENS or n_header != header_bytes(n_tokens) or content.nbytes < n_header:
        raise CacheFormatError("the header's length is wrong")
    body_end = n_header - _CHECKSUM_BYTES
    if xxhash.xxh3_128_digest(content[:body_end]) != bytes(content[body_end:n_header]):
        raise CacheFormatError("the header's checksum does not match")
    tokens = bytes(content[_FIXED.size : body_end])
    sound = max(start, slice_end) < MAX_POSITION and reason in SaveReason.__members__.values()
    if flags or reserved or not sound or child_key(parent, tokens) != key:
        raise CacheFormatError("the header contradicts itself")
    block = Block(key, parent, namespace, start, tokens, SaveReason(reason), recipe, slice_end)
    return block, payload_bytes, payload_checksum


def encode(block: Block, payload: memoryview) -> tuple[bytes, memoryview]:
    """Return the content of a file, as the header and what follows it."""
    return encode_header(block, payload), payload


def encoded_bytes(n_tokens: int, payload_bytes: int) -> int:
    """Return the length of what `encode` returns for a block of `n_tokens`."""
    return header_bytes(n_tokens) + payload_bytes


def decode(content: memoryview) -> tuple[Block, memoryview]:
    """Verify the content of a file that is in memory.

    Returns:
        the block, and its payload as a part of `content`.

    Raises:
        CacheFormatError: the content is not valid.
    """
    block, payload_bytes, checksum = decode_header(content)
    n_header = header_bytes(block.n_tokens)
    if content.nbytes != n_header + payload_bytes:
        raise CacheFormatError(f"{content.nbytes} bytes; the header says {n_header + payload_bytes}")
    payload = content[n_header:]
    if xxhash.xxh3_128_digest(payload) != checksum:
        raise CacheFormatError("the payload's checksum does not match")
    return block, payload


def read(path: Path) -> tuple[Block, NDArray[np.uint8]]:
    """Read and verify one file.

    Returns:
        the block, and its payload in a new buffer.

    Raises:
        CacheFormatError: the file is not a regular file, or not valid.
        OSError: the file cannot be read.
    """
    with _open_regular(path) as (descriptor, size):
        block, payload_bytes, checksum = read_header_from(partial(os.read, descriptor), size)
        # Not a bytearray, which Python fills with zeros first.
        payload = np.empty(payload_bytes, np.uint8)
        done = 0
        while done < payload_bytes:
            n = os.readv(descriptor, [payload.data[done:]])
            if n == 0:
                raise CacheFormatError("the file ended while it was read")
            done += n
    if xxhash.xxh3_128_digest(payload.data) != checksum:
        raise CacheFormatError("the payload's checksum does not match")
    return block, payload


def read_header(path: Path) -> tuple[Block, int]:
    """Read the block and the payload's length from the header, and verify the length of the file.

    Raises:
        CacheFormatError, OSError: as `read`.
    """
    with _open_regular(path) as (descriptor, size):
        block, payload_bytes, _ = read_header_from(partial(os.read, descriptor), size)
    return block, payload_bytes


def read_header_from(read: Callable[[int], bytes], size: int) -> tuple[Block, int, bytes]:
    """Read a header up to the payload, and verify the size of the file.

    Args:
        read: called with a number of bytes; returns the next bytes, at most that many.
        size: bytes of header and payload together.

    Returns:
        as `decode_header`.

    Raises:
        CacheFormatError: the header is not valid, or does not match `size`.
    """
    head = read(_FIXED.size)
    if len(head) == _FIXED.size:
        n_header = struct.unpack_from("<I", head, 16)[0]
        head += read(min(max(n_header - _FIXED.size, 0), header_bytes(MAX_TOKENS)))
    block, payload_bytes, checksum = decode_header(memoryview(head))
    expected = header_bytes(block.n_tokens) + payload_bytes
    if size != expected:
        raise CacheFormatError(f"{size} bytes; the header says {expected}")
    return block, payload_bytes, checksum


def write(path: Path, block: Block, payload: memoryview, *, durable: bool = True) -> int:
    """Write one new file, readable by its owner only.

    Args:
        path: a temporary name that does not exist. The caller renames the file into place.
        durable: whether the file must be on stable storage when this returns.

    Returns:
        bytes written.
    """
    header = encode_header(block, payload)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for piece in (memoryview(header), payload):
            done = 0
            while done < piece.nbytes:
                done += os.write(descriptor, piece[done:])
        if durable:
            getattr(os, "fdatasync", os.fsync)(descriptor)
    finally:
        os.close(descriptor)
    return len(header) + payload.nbytes


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file, and yield its descriptor and size. Does not follow links."""
    # O_NONBLOCK: the open of a FIFO must not block before fstat identifies it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CacheFormatError("not a regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)
