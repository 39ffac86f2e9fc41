"""Reads and writes .kvc files: one block with its tokens and its payload, verified and, with a key, encrypted.

docs/kvc-format.md specifies the format: version 1 with checksums, version 2 encrypted. All is verified before
use: the header by its checksum, the key by the tokens, the length of the file by the header, and the payload by its
checksum. In an encrypted file, AES-GCM authenticates header and payload. File tiers and archives use this module:
it is the one place where a block becomes bytes, and bytes become a block.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from erllama.cache.blocks.block import MAX_POSITION, Block, SaveReason
from erllama.cache.blocks.encryption import (
    ID_BYTES,
    SALT_BYTES,
    TAG_BYTES,
    ContentKey,
    decryptor,
    encryptor,
    finish,
)
from erllama.cache.blocks.keys import TOKEN_BYTES, child_key
from erllama.errors import CacheFormatError, CacheKeyError, CacheVersionError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext

MAGIC = b"\x89KVC\r\n\x1a\n"  # like PNG's: not text, and changed by a copy in text mode
VERSION = 1
ENCRYPTED_VERSION = 2
SUFFIX = ".kvc"

# magic, version, flags, header bytes, reason, start, slice_end, payload bytes, tokens, reserved,
# namespace, parent, key, recipe, payload checksum; then the tokens and the header's checksum.
_FIXED = struct.Struct("<8sIIIIQQQII32s32s32s16s16s")
_CHECKSUM_BYTES = 16
_NO_CHECKSUM = bytes(_CHECKSUM_BYTES)  # of the payload of an encrypted file, which AES-GCM authenticates
MAX_TOKENS = 1 << 20  # far above any block size; limits what an invalid header can make a reader read

# magic, version, flags, header bytes, reserved, payload bytes, id of the key, salt; then the encrypted header of
# version 1 with its tag, the encrypted payload, and its tag.
_ENCRYPTED_FIXED = struct.Struct(f"<8sIIIIQ{ID_BYTES}s{SALT_BYTES}s")
_PREFIX_BYTES = 20  # magic, version, flags and header bytes, which both versions have
_HEADER_MESSAGE, _PAYLOAD_MESSAGE = 0, 1  # numbers of the two messages under the key of a file
_PIECE = 256 << 10  # bytes encrypted at a time: they stay in the processor's cache

ReadInto = Callable[[memoryview], int]  # fills a part of a buffer with the next bytes; returns how many


class Header(NamedTuple):
    """A verified header: its block, the length of the payload, and what verifies the payload."""

    block: Block
    payload_bytes: int
    checksum: bytes
    decryptor: AEADDecryptionContext | None


def header_bytes(n_tokens: int) -> int:
    """Return the length of the header of a block of `n_tokens`, with its checksum."""
    return _FIXED.size + n_tokens * TOKEN_BYTES + _CHECKSUM_BYTES


def file_bytes(n_tokens: int, payload_bytes: int, *, encrypted: bool = False) -> int:
    """Return the length of the file of a block of `n_tokens`."""
    extra = _ENCRYPTED_FIXED.size + 2 * TAG_BYTES if encrypted else 0
    return extra + header_bytes(n_tokens) + payload_bytes


def encode(block: Block, payload: memoryview, content_key: ContentKey | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a block's file, in pieces. A piece is valid until the next one.

    Args:
        content_key: encrypts them; None for a file that is not encrypted.
    """
    if content_key is None:
        yield memoryview(encode_header(block, payload))
        yield payload
        return
    salt = os.urandom(SALT_BYTES)
    file_key = content_key.file_key(salt)
    n_header = _ENCRYPTED_FIXED.size + header_bytes(block.n_tokens) + TAG_BYTES
    fixed = _ENCRYPTED_FIXED.pack(
        MAGIC, ENCRYPTED_VERSION, 0, n_header, 0, payload.nbytes, content_key.key_id, salt
    )
    header = _encode_header(block, payload.nbytes, _NO_CHECKSUM)
    cipher = encryptor(file_key, _HEADER_MESSAGE)
    cipher.authenticate_additional_data(fixed)
    yield memoryview(fixed + cipher.update(header) + cipher.finalize() + cipher.tag)
    cipher = encryptor(file_key, _PAYLOAD_MESSAGE)
    cipher.authenticate_additional_data(header)  # binds the payload to its block
    piece = memoryview(bytearray(min(_PIECE, payload.nbytes)))
    for at in range(0, payload.nbytes, _PIECE):
        n = cipher.update_into(payload[at : at + _PIECE], piece)
        yield piece[:n]
    cipher.finalize()
    yield memoryview(cipher.tag)


def encode_header(block: Block, payload: memoryview) -> bytes:
    """Return the header of a file that is not encrypted, which is written before `payload`."""
    return _encode_header(block, payload.nbytes, xxhash.xxh3_128_digest(payload))


def _encode_header(block: Block, payload_bytes: int, payload_checksum: bytes) -> bytes:
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        0,
        header_bytes(block.n_tokens),
        block.reason,
        block.start,
        block.slice_end,
        payload_bytes,
        block.n_tokens,
        0,
        block.namespace,
        block.parent,
        block.key,
        block.recipe,
        payload_checksum,
    )
    body = fixed + block.tokens
    return body + xxhash.xxh3_128_digest(body)


def decode_header(content: memoryview) -> tuple[Block, int, bytes]:
    """Decode the start of a file that is not encrypted.

    Returns:
        the block, and the length and the checksum of its payload.

    Raises:
        CacheFormatError: there is no valid header of a version that this release reads.
        CacheKeyError: the file is encrypted.
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
    if version == ENCRYPTED_VERSION:
        raise CacheKeyError("the file is encrypted; open it with its key")
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


def read(path: Path, content_key: ContentKey | None = None) -> tuple[Block, NDArray[np.uint8]]:
    """Read and verify one file.

    Args:
        content_key: the key that the file is encrypted with; None for a file that is not encrypted.

    Returns:
        the block, and its payload in a new buffer.

    Raises:
        CacheFormatError: the file is not a regular file, or not valid, or not encrypted with this key.
        CacheKeyError: the file is encrypted, and `content_key` is None.
        OSError: the file cannot be read.
    """
    with _open_regular(path) as (read_into, size):
        header = read_header_from(read_into, size, content_key)
        return header.block, read_payload_from(read_into, header)


def read_header(path: Path, content_key: ContentKey | None = None) -> tuple[Block, int]:
    """Read the block and the payload's length from the header, and verify the length of the file.

    Raises:
        CacheFormatError, CacheKeyError, OSError: as `read`.
    """
    with _open_regular(path) as (read_into, size):
        header = read_header_from(read_into, size, content_key)
        return header.block, header.payload_bytes


def decode(content: memoryview, content_key: ContentKey | None = None) -> tuple[Block, NDArray[np.uint8]]:
    """Return block and payload of the whole content of a file.

    Raises:
        CacheFormatError, CacheKeyError: as `read`.
    """
    at = 0

    def read_into(buffer: memoryview) -> int:
        nonlocal at
        piece = content[at : at + buffer.nbytes]
        buffer[: piece.nbytes] = piece
        at += piece.nbytes
        return piece.nbytes

    header = read_header_from(read_into, content.nbytes, content_key)
    return header.block, read_payload_from(read_into, header)


def read_header_from(read_into: ReadInto, size: int, content_key: ContentKey | None = None) -> Header:
    """Read a header up to the payload, and verify the size of the file.

    Args:
        read_into: fills a part of a buffer with the next bytes, and returns how many; 0 at the end.
        size: bytes of the whole file.

    Raises:
        CacheFormatError: the header is not valid, or does not match `size`.
        CacheKeyError: the file is encrypted, and `content_key` is None.
    """
    fixed = _FIXED if content_key is None else _ENCRYPTED_FIXED
    head = _read_up_to(read_into, fixed.size)
    if len(head) == fixed.size:
        n_header = struct.unpack_from("<I", head, _PREFIX_BYTES - 4)[0]
        limit = _ENCRYPTED_FIXED.size + header_bytes(MAX_TOKENS) + TAG_BYTES
        head += _read_up_to(read_into, min(max(n_header - fixed.size, 0), limit))
    if content_key is None:
        header = Header(*decode_header(memoryview(head)), None)
    else:
        header = _decrypt_header(memoryview(head), content_key)
    expected = file_bytes(header.block.n_tokens, header.payload_bytes, encrypted=content_key is not None)
    if size != expected:
        raise CacheFormatError(f"{size} bytes; the header says {expected}")
    return header


def _decrypt_header(content: memoryview, content_key: ContentKey) -> Header:
    """Decrypt the start of a file."""
    if content.nbytes < _ENCRYPTED_FIXED.size:
        raise CacheFormatError(f"{content.nbytes} bytes are too few for a header")
    fields = _ENCRYPTED_FIXED.unpack_from(content)
    magic, version, flags, n_header, reserved, payload_bytes, key_id, salt = fields
    if magic != MAGIC:
        raise CacheFormatError("not a .kvc file")
    if version > ENCRYPTED_VERSION:
        raise CacheVersionError(f"version {version}; this release reads version {ENCRYPTED_VERSION}")
    if version != ENCRYPTED_VERSION:
        raise CacheFormatError("the file is not encrypted")
    if key_id != content_key.key_id:
        raise CacheFormatError("the file is encrypted with another key than its name")
    n_inner = n_header - _ENCRYPTED_FIXED.size - TAG_BYTES
    if flags or reserved or content.nbytes != n_header or not 0 < n_inner <= header_bytes(MAX_TOKENS):
        raise CacheFormatError("the header's length is wrong")
    file_key = content_key.file_key(salt)
    cipher = decryptor(file_key, _HEADER_MESSAGE)
    cipher.authenticate_additional_data(content[: _ENCRYPTED_FIXED.size])
    inner = cipher.update(content[_ENCRYPTED_FIXED.size : n_header - TAG_BYTES])
    finish(cipher, bytes(content[n_header - TAG_BYTES :]))
    block, inner_bytes, checksum = decode_header(memoryview(inner))
    if inner_bytes != payload_bytes or checksum != _NO_CHECKSUM:
        raise CacheFormatError("the header contradicts itself")
    cipher = decryptor(file_key, _PAYLOAD_MESSAGE)
    cipher.authenticate_additional_data(inner)
    return Header(block, payload_bytes, checksum, cipher)


def read_payload_from(read_into: ReadInto, header: Header) -> NDArray[np.uint8]:
    """Read the payload after its header into a new buffer, and verify it.

    Raises:
        CacheFormatError: it ends early or does not match the header.
        MemoryError: there is no memory for it.
    """
    # Not a bytearray, which Python fills with zeros first.
    payload = np.empty(header.payload_bytes, np.uint8)
    if header.decryptor is None:
        _fill(read_into, payload.data)
        if xxhash.xxh3_128_digest(payload.data) != header.checksum:
            raise CacheFormatError("the payload's checksum does not match")
        return payload
    piece = memoryview(bytearray(min(_PIECE, header.payload_bytes)))
    for at in range(0, header.payload_bytes, _PIECE):
        n = min(_PIECE, header.payload_bytes - at)
        _fill(read_into, piece[:n])
        header.decryptor.update_into(piece[:n], payload.data[at : at + n])
    tag = bytearray(TAG_BYTES)
    _fill(read_into, memoryview(tag))
    finish(header.decryptor, bytes(tag))
    return payload


def _fill(read_into: ReadInto, buffer: memoryview) -> None:
    done = 0
    while done < buffer.nbytes:
        n = read_into(buffer[done:])
        if n == 0:
            raise CacheFormatError("the file ended while it was read")
        done += n


def _read_up_to(read_into: ReadInto, n_bytes: int) -> bytes:
    """Read `n_bytes`; fewer at the end of the file."""
    buffer, done = bytearray(n_bytes), 0
    while done < n_bytes and (n := read_into(memoryview(buffer)[done:])):
        done += n
    return bytes(buffer[:done])


def write(
    path: Path,
    block: Block,
    payload: memoryview,
    *,
    durable: bool = True,
    content_key: ContentKey | None = None,
) -> int:
    """Write one new file, readable by its owner only.

    Args:
        path: a temporary name that does not exist. The caller renames the file into place.
        durable: whether the file must be on stable storage when this returns.
        content_key: encrypts the file; None for a file that is not encrypted.

    Returns:
        bytes written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    n_bytes = 0
    try:
        for piece in encode(block, payload, content_key):
            done = 0
            while done < piece.nbytes:
                done += os.write(descriptor, piece[done:])
            n_bytes += done
        if durable:
            getattr(os, "fdatasync", os.fsync)(descriptor)
    finally:
        os.close(descriptor)
    return n_bytes


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[ReadInto, int]]:
    """Open a regular file; yield a function that reads it, and its size. Does not follow links."""
    # O_NONBLOCK: the open of a FIFO must not block before fstat identifies it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CacheFormatError("not a regular file")
        yield lambda buffer: os.readv(descriptor, [buffer]), status.st_size
    finally:
        os.close(descriptor)
