"""Reads and writes .kvc files: one block, its tokens and its payload, checksummed.

The format is specified in docs/kvc-format.md. Nothing is believed before it is
checked: the header by its checksum, the key against the tokens, the length of
the file against the header, the payload by its checksum.
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

MAGIC = b"\x89KVC\r\n\x1a\n"  # as PNG's: shows a text-mode copy, and is no text
VERSION = 1
SUFFIX = ".kvc"

# magic, version, flags, header bytes, reason, start, slice_end, payload bytes, tokens, reserved,
# namespace, parent, key, recipe, payload checksum; then the tokens and the header's checksum.
_FIXED = struct.Struct("<8sIIIIQQQII32s32s32s16s16s")
_CHECKSUM_BYTES = 16
MAX_TOKENS = 1 << 20  # far above any block size; bounds what a header can ask us to read


def header_bytes(n_tokens: int) -> int:
    """Length of the header of a block of `n_tokens`, its checksum included."""
    return _FIXED.size + n_tokens * TOKEN_BYTES + _CHECKSUM_BYTES


def encode_header(block: Block, payload: memoryview) -> bytes:
    """The header that goes before `payload`."""
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
    """The block, its payload's length and its payload's checksum, from the start of a file.

    Raises:
        CacheFormatError: no valid header of a version that this code reads.
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
        kind = CacheVersionError if version > VERSION else CacheFormatError
        raise kind(f"version {version}; this release reads version {VERSION}")
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


def read(path: Path) -> tuple[Block, NDArray[np.uint8]]:
    """Read and check one file: its block, and its payload in a buffer of its own.

    Raises:
        CacheFormatError: not a regular file, or not valid.
        OSError: it cannot be read.
    """
    with _opened(path) as (descriptor, size):
        block, payload_bytes, checksum = read_header_from(partial(os.read, descriptor), size)
        # Not a bytearray, which would be filled with zeros first.
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
    """The block and the payload's length, from the header alone, after checking the file's length.

    Raises:
        CacheFormatError, OSError: as `read`.
    """
    with _opened(path) as (descriptor, size):
        block, payload_bytes, _ = read_header_from(partial(os.read, descriptor), size)
    return block, payload_bytes


def read_header_from(read: Callable[[int], bytes], size: int) -> tuple[Block, int, bytes]:
    """Read a header and stop at the payload, whose length the size of the whole confirms.

    Args:
        read: returns the next bytes, at most as many as asked for.
        size: bytes of header and payload together.

    Returns:
        as `decode_header`.

    Raises:
        CacheFormatError: the header is not valid, or not of a file of this size.
    """
    head = read(_FIXED.size)
    if len(head) == _FIXED.size:
        n_header = struct.unpack_from("<I", head, 16)[0]
        head += read(min(max(n_header - _FIXED.size, 0), header_bytes(MAX_TOKENS)))
    block, payload_bytes, checksum = decode_header(memoryview(head))
    expected = header_bytes(block.n_tokens) + payload_bytes
    if size != expected:
        raise CacheFormatError(f"{size} bytes where the header says {expected}")
    return block, payload_bytes, checksum


def write(path: Path, block: Block, payload: memoryview, *, durable: bool = True) -> int:
    """Write one new file, private to its owner, and, if `durable`, on stable storage when this returns.

    `path` is a temporary name: publishing it is the caller's.

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
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """The descriptor and size of a regular file; links are not followed."""
    # O_NONBLOCK: a FIFO put in our way must not hang us before fstat tells.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CacheFormatError("not a regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)
