"""Archives of blocks: accepted as far as they have the form that `export` writes."""

from __future__ import annotations

import io
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from erllama.cache import Cache
from erllama.cache.admin.archive import ImportResult, export_blocks, import_blocks
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.errors import CacheFormatError
from support.storage.blocks import blocks_of

BLOCKS = blocks_of(np.arange(64, dtype=np.int32))
PAYLOAD = memoryview(bytes(range(256)))
KEY = "ab" * 32


class Stored:
    """Replaces a directory and records the blocks that would be stored."""

    tier = "disk"

    def __init__(self) -> None:
        self.blocks: list[tuple[Block, bytes]] = []

    def put(self, block: Block, payload: memoryview) -> bool:
        self.blocks.append((block, bytes(payload)))
        return True


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return written.getvalue()


def good() -> bytes:
    """Write an archive as `export` does."""
    return archive(
        *(
            (
                tarfile.TarInfo(f"blocks/{block.key.hex()}.kvc"),
                bytes(kvc.encode_header(block, PAYLOAD)) + bytes(PAYLOAD),
            )
            for block in BLOCKS
        )
    )


def imported(source: io.BytesIO) -> tuple[ImportResult, Stored]:
    stored = Stored()
    return import_blocks(stored, source), stored  # type: ignore[arg-type]


def extended(kind: bytes, size: int, content: bytes = b"") -> bytes:
    """Return an extended header that claims `size` bytes, and its actual content."""
    header = tarfile.TarInfo("././@LongLink" if kind in b"LK" else "PaxHeaders/x")
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)


def test_an_archive_round_trips(tmp_path: Path) -> None:
    with Cache(disk=tmp_path / "kv", watch=False):
        pass
    written = io.BytesIO()
    with CacheFiles(tmp_path / "kv") as files:
        for block in BLOCKS:
            files.put(block, PAYLOAD)
        export_blocks(files, written)
    assert len(written.getvalue()) % tarfile.RECORDSIZE == 0
    done, stored = imported(io.BytesIO(written.getvalue() + b"beyond the end"))
    assert (done.n_blocks, done.refused) == (len(BLOCKS), [])
    assert set(stored.blocks) == {(block, bytes(PAYLOAD)) for block in BLOCKS}


def test_an_archive_stream_is_read_to_its_last_record() -> None:
    """Otherwise the writer would get an error from the pipe."""
    stream = io.BytesIO(good())
    imported(stream)
    assert stream.tell() == len(good())


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "stream"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K", b"S"])
@pytest.mark.parametrize("size", [40_000, 1 << 32])
def test_an_extended_header_is_refused_before_it_is_read(
    tmp_path: Path, kind: bytes, size: int, as_file: bool
) -> None:
    many = b"".join(b"11 a%03d=bc\n" % (i % 1000) for i in range(3600))
    content = extended(kind, size, many[:40_000]) + good()
    (tmp_path / "a.tar").write_bytes(content)
    stored = Stored()
    with (tmp_path / "a.tar").open("rb", buffering=0) if as_file else io.BytesIO(content) as source:
        tracemalloc.start()
        try:
            with pytest.raises(CacheFormatError, match="not a plain file"):
                import_blocks(stored, source)  # type: ignore[arg-type]
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        assert source.tell() == tarfile.BLOCKSIZE
    assert stored.blocks == []


def test_memory_use_is_bounded_by_a_block_not_by_declared_sizes() -> None:
    """A size that the block's own header does not confirm is refused before a payload is read."""
    member = tarfile.TarInfo(f"blocks/{KEY}.kvc")
    member.size = 1 << 32
    content = member.tobuf(tarfile.GNU_FORMAT) + bytes(kvc.encode_header(BLOCKS[0], PAYLOAD))
    tracemalloc.start()
    try:
        with pytest.raises(CacheFormatError, match=f"ends within 'blocks/{KEY}"):
            imported(io.BytesIO(content + b"x" * 10_000))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_truncated_archive_is_refused() -> None:
    whole = good()
    for n in (0, 1, 511, 512, 513, 1024, len(BLOCKS) * 1024):
        with pytest.raises(CacheFormatError, match=r"the archive ends|archive is empty"):
            imported(io.BytesIO(whole[:n]))
    with pytest.raises(CacheFormatError, match="archive is empty"):
        imported(io.BytesIO(b"\0" * 10240))


def test_flipped_bytes_are_refused_and_store_no_other_block(tmp_path: Path) -> None:
    """`make fuzz` does the same for longer."""
    whole = good()
    there = {(block, bytes(PAYLOAD)) for block in BLOCKS}
    kinds = [tarfile.XHDTYPE, tarfile.XGLTYPE, b"L", b"K", b"S", b"5", b"1", b"\xff"]
    outcomes = {"stored": 0, "refused alone": 0, "refused": 0}
    n = int(os.environ.get("ERLLAMA_FUZZ_N", "200"))
    for seed in range(n):
        random_ = random.Random(seed)
        content = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(BLOCKS) * 1024)
            content[at] = random_.choice([0, 255, content[at] ^ 1 << random_.randrange(8), random_.randrange(256)])
        if random_.random() < 0.3:  # headers with valid checksums, so that their values are used
            member = tarfile.TarInfo(random_.choice([f"blocks/{KEY}.kvc", "x", "x" * 150]))
            member.type = random_.choice([*kinds, tarfile.REGTYPE])
            member.size = random_.choice([0, 1, 512, 10_000, 1 << 33, 1 << 40])
            at = random_.randrange(0, len(content), 512)
            content[at:at] = member.tobuf(tarfile.GNU_FORMAT)[-512:]
        del content[random_.choice([len(content), random_.randrange(len(content))]) :]
        (tmp_path / "a.tar").write_bytes(content)
        results = []
        for source in (io.BytesIO(content), (tmp_path / "a.tar").open("rb")):
            stored = Stored()
            with source:
                try:
                    done = import_blocks(stored, source)  # type: ignore[arg-type]
                    results.append("refused alone" if done.refused else "stored")
                except CacheFormatError:
                    results.append("refused")
            assert set(stored.blocks) <= there, seed
        assert results[0] == results[1], seed
        outcomes[results[0]] += 1
    assert min(outcomes.values()) > n // 50, outcomes
