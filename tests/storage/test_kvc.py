"""A .kvc file holds exactly what was written, or it is refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama.cache import Block, SaveReason, child_key, namespace_key, token_bytes
from erllama.cache.blocks import kvc
from erllama.errors import CacheFormatError

NAMESPACE = namespace_key({"model": "m"})

tokens_lists = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


def block_of(tokens: list[int], start: int = 0, slice_end: int = 0) -> Block:
    parent = child_key(NAMESPACE, b"before") if start else NAMESPACE
    raw = token_bytes(np.array(tokens, np.uint32))
    return Block.following(parent, NAMESPACE, start, raw, SaveReason.FINISH, bytes(range(16)), slice_end)


def file_bytes(block: Block, payload: bytes) -> bytes:
    return kvc.encode_header(block, memoryview(payload)) + payload


def read_back(tmp_path: Path, content: bytes) -> tuple[Block, bytes]:
    path = tmp_path / "content.kvc"
    path.write_bytes(content)
    block, payload = kvc.read(path)
    return block, payload.tobytes()


@given(
    tokens=tokens_lists,
    start=st.integers(0, 2**63 - 1),
    slice_end=st.integers(0, 2**63 - 1),
    payload=st.binary(max_size=200),
)
def test_a_block_file_round_trips(
    tmp_path: Path, tokens: list[int], start: int, slice_end: int, payload: bytes
) -> None:
    block = block_of(tokens, start, slice_end)
    assert read_back(tmp_path, file_bytes(block, payload)) == (block, payload)


def test_a_written_file_is_private_and_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "block.kvc"
    block, payload = block_of([1, 2, 3], 256, 512), np.arange(1000, dtype=np.uint8).data
    written = kvc.write(path, block, payload)
    assert written == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    found, found_payload = kvc.read(path)
    assert found == block
    assert found_payload.data == payload
    assert kvc.read_header(path) == (block, 1000)


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    content = file_bytes(block_of([1, 2, 3]), b"payload")
    for at in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            with pytest.raises(CacheFormatError):
                read_back(tmp_path, bytes(damaged))


def test_every_truncation_and_extension_is_detected(tmp_path: Path) -> None:
    content = file_bytes(block_of([1, 2, 3]), b"payload")
    path = tmp_path / "block.kvc"
    for length in range(len(content)):
        with pytest.raises(CacheFormatError):
            read_back(tmp_path, content[:length])
        path.write_bytes(content[:length])
        with pytest.raises(CacheFormatError):
            kvc.read_header(path)
    with pytest.raises(CacheFormatError):
        read_back(tmp_path, content + b"\0")


@given(tokens=tokens_lists, payload=st.binary(max_size=50), other=st.binary(max_size=50))
def test_a_header_with_the_payload_of_another_file_is_refused(
    tmp_path: Path, tokens: list[int], payload: bytes, other: bytes
) -> None:
    header = kvc.encode_header(block_of(tokens), memoryview(payload))
    if payload != other:
        with pytest.raises(CacheFormatError):
            read_back(tmp_path, header + other)


def test_an_oversized_header_is_refused_before_allocating(tmp_path: Path) -> None:
    content = bytearray(file_bytes(block_of([1, 2, 3]), b"payload"))
    struct.pack_into("<I", content, 16, 2**32 - 1)
    path = tmp_path / "block.kvc"
    path.write_bytes(content)
    with pytest.raises(CacheFormatError):
        kvc.read_header(path)


def test_paths_that_are_not_regular_files_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "target.kvc"
    kvc.write(target, block_of([1]), memoryview(b"x"))
    link, fifo = tmp_path / "link.kvc", tmp_path / "fifo.kvc"
    link.symlink_to(target)
    os.mkfifo(fifo)
    with pytest.raises(OSError):
        kvc.read(link)
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(CacheFormatError):
            kvc.read(path)


def test_the_file_layout_matches_the_documentation() -> None:
    """Field by field as in docs/kvc-format.md, without the structures of the module."""
    block, payload = block_of([7, 8], 512, 1024), b"abc"
    content = file_bytes(block, payload)
    assert content[:8] == b"\x89KVC\r\n\x1a\n"
    version, flags, header, reason = struct.unpack_from("<4I", content, 8)
    assert (version, flags, header, reason) == (1, 0, 208, 3)
    start, slice_end, payload_bytes = struct.unpack_from("<3Q", content, 24)
    assert (start, slice_end, payload_bytes) == (512, 1024, 3)
    assert struct.unpack_from("<2I", content, 48) == (2, 0)
    assert content[56:88] == block.namespace
    assert content[88:120] == block.parent
    assert content[120:152] == block.key
    assert content[152:168] == block.recipe
    assert struct.unpack_from("<2I", content, 184) == (7, 8)
    assert content[header:] == payload
