"""Files changed behind the cache's back in every way: refused, or equal to what was saved.

ERLLAMA_MUTATIONS says how many; `make stress` tries more.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from erllama.cache import Block, Cache
from erllama.cache.blocks import kvc
from erllama.errors import CacheFormatError
from support.storage.blocks import NAMESPACE, SIZE, blocks_of

MUTATIONS = int(os.environ.get("ERLLAMA_MUTATIONS", "300"))

# From the layout in docs/kvc-format.md: offsets and formats of the fields that hold lengths.
LENGTHS = {"header length": (16, "<I"), "payload length": (40, "<Q"), "number of tokens": (48, "<I")}
N_TOKENS_AT, TOKENS_AT, CHECKSUM_BYTES = 48, 184, 16


def payload_for(block: Block) -> bytes:
    """Return payloads of two lengths, so that files can be confused."""
    return block.key * (4 if block.key[0] % 2 else 9)


def contexts() -> list[NDArray[np.int32]]:
    """Return contexts with and without common prefixes, and with and without tails."""
    starts = [(0, 64), (0, 40), (0, 21), (500, 53), (900, 16), (2000, 7), (2000, 96)]
    return [np.arange(start, start + n, dtype=np.int32) for start, n in starts]


SAVED = {block.key: block for tokens in contexts() for block in blocks_of(tokens)}
FILES = {
    key: kvc.encode_header(block, memoryview(payload_for(block))) + payload_for(block)
    for key, block in SAVED.items()
}


# --- mutations -------------------------------------------------------------------------------


def flip_bits(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """Replace a run of bytes by zeros, as in a hole, or by noise."""
    at, n = dice.randrange(len(content)), dice.choice((1, 4, 16, 512))
    run = bytes(n) if dice.random() < 0.5 else dice.randbytes(n)
    return (content[:at] + run + content[at + n :])[: len(content)]


def insert(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    return content[:at] + dice.randbytes(dice.choice((1, 4, 16))) + content[at:]


def cut_out(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content))
    return content[:at] + content[at + dice.choice((1, 4, 16)) :]


def truncate(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def extend(content: bytes, dice: random.Random) -> bytes:
    return content + dice.choice((b"\0", dice.randbytes(16), content))


def parts(content: bytes) -> tuple[bytes, bytes]:
    """Split an intact file into header and payload."""
    (n_header,) = struct.unpack_from("<I", content, 16)
    return content[:n_header], content[n_header:]


def exchange_headers(content: bytes, dice: random.Random) -> bytes:
    other = dice.choice([file for file in FILES.values() if file != content])
    return parts(other)[0] + parts(content)[1]


def exchange_payloads(content: bytes, dice: random.Random) -> bytes:
    other = dice.choice([file for file in FILES.values() if file != content])
    return parts(content)[0] + parts(other)[1]


def mix(content: bytes, dice: random.Random) -> bytes:
    """Join the start of one file and the end of another, as a file system crash may leave them."""
    other = dice.choice([file for file in FILES.values() if file != content])
    at = dice.randrange(min(len(content), len(other)))
    return content[:at] + other[at:]


def change_lengths(content: bytes, dice: random.Random) -> bytes:
    """Change one of the lengths, and correct the checksum of the header."""
    changed = bytearray(content)
    for at, packing in dice.sample(list(LENGTHS.values()), dice.randrange(1, 4)):
        (right,) = struct.unpack_from(packing, changed, at)
        wrong = dice.choice((0, 1, right - 1, right + 1, right + 4, 2**31, 2**32 - 1, dice.randrange(10_000)))
        struct.pack_into(packing, changed, at, max(wrong, 0))
    if dice.random() < 0.5:  # consistent ones pass more checks
        (n_tokens,) = struct.unpack_from("<I", changed, N_TOKENS_AT)
        struct.pack_into("<I", changed, 16, min(TOKENS_AT + 4 * n_tokens + CHECKSUM_BYTES, 2**32 - 1))
    return seal(bytes(changed), dice)


def seal(content: bytes, dice: random.Random) -> bytes:
    """Write the header checksum at the place that the header, or the number of tokens, gives."""
    (n_header,) = struct.unpack_from("<I", content, 16)
    (n_tokens,) = struct.unpack_from("<I", content, N_TOKENS_AT)
    body_end = dice.choice((n_header - CHECKSUM_BYTES, TOKENS_AT + 4 * n_tokens))
    if not TOKENS_AT <= body_end <= len(content) - CHECKSUM_BYTES:
        return content
    checksum = xxhash.xxh3_128_digest(content[:body_end])
    sealed = content[:body_end] + checksum + content[body_end + CHECKSUM_BYTES :]
    if dice.random() < 0.5:  # with the length that it then states
        (n_payload,) = struct.unpack_from("<Q", content, 40)
        wanted = body_end + CHECKSUM_BYTES + min(n_payload, 20_000)
        sealed = (sealed + bytes(max(wanted - len(sealed), 0)))[:wanted]
    return sealed


Mutation = Callable[[bytes, random.Random], bytes]
MUTATE: list[Mutation] = [
    flip_bits,
    change_bytes,
    insert,
    cut_out,
    truncate,
    extend,
    exchange_headers,
    exchange_payloads,
    mix,
    change_lengths,
]


# --- one file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mutation", MUTATE, ids=lambda mutation: mutation.__name__)
def test_a_changed_file_is_refused_or_equal_to_the_original(tmp_path: Path, mutation: Mutation) -> None:
    dice = random.Random(mutation.__name__)
    path = tmp_path / "changed.kvc"
    refused = 0
    for _ in range(-(-MUTATIONS // len(MUTATE))):
        key = dice.choice(list(FILES))
        path.write_bytes(mutation(FILES[key], dice))
        for reading in (kvc.read_header, kvc.read):
            try:
                block, found = reading(path)
            except (CacheFormatError, OSError):
                refused += reading is kvc.read
                continue
            if isinstance(found, int):
                assert block in SAVED.values(), "the header of a file with another payload"
            else:
                assert block == SAVED[block.key]
                assert found.tobytes() == payload_for(block)
                assert path.read_bytes() == FILES[block.key]
    assert refused > 0.8 * MUTATIONS / len(MUTATE), "few changes have no effect"


# --- a directory of them -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fill a directory with every block, none replaced by a longer one."""
    root = tmp_path_factory.mktemp("sound") / "kv"
    with Cache(block_size=SIZE, ram=0, disk=root) as cache:
        for tokens in contexts():
            for block in blocks_of(tokens):
                cache.save(block, payload_for(block), trimmable=False)
            cache.flush()
    for path in (root / "blocks").iterdir():
        assert path.read_bytes() == FILES[bytes.fromhex(path.stem)]
    return root


def mutate_some(root: Path, dice: random.Random, share: float) -> int:
    """Change files in a directory; some keep the time that the index has."""
    n_mutated = 0
    for key, content in FILES.items():
        path = root / "blocks" / f"{key.hex()}.kvc"
        if dice.random() > share or not path.exists():
            continue
        then = path.stat().st_mtime_ns
        changed = dice.choice([*FILES.values()]) if dice.random() < 0.1 else dice.choice(MUTATE)(content, dice)
        path.write_bytes(changed)
        # Otherwise an hour ago: a file younger than two seconds may still be being copied.
        then = then if dice.random() < 0.5 else time.time_ns() - 3600 * 10**9
        os.utime(path, ns=(then, then))
        n_mutated += 1
    return n_mutated


def load_all(cache: Cache) -> int:
    """Look up every context, and check all that can be loaded."""
    n_loads = 0
    for tokens in contexts():
        with cache.lookup(NAMESPACE, tokens) as match:
            for block in match.blocks:
                loaded = cache.load(block)
                if loaded is not None:
                    assert loaded.block == SAVED[block.key]
                    assert bytes(loaded.payload) == payload_for(block)
                    n_loads += 1
    for key, block in SAVED.items():
        loaded = cache.load(block)
        assert loaded is None or bytes(loaded.payload) == payload_for(SAVED[key])
    return n_loads


def save_all(cache: Cache) -> None:
    for tokens in contexts():
        for block in blocks_of(tokens):
            cache.save(block, payload_for(block), trimmable=False)
    cache.flush()


@pytest.mark.parametrize("index", ["kept", "lost"])
@pytest.mark.parametrize("ram", [0, "1MiB"])
def test_a_directory_of_changed_files_serves_no_wrong_payload(
    tmp_path: Path, sound: Path, index: str, ram: str | int
) -> None:
    dice = random.Random(index + str(ram))
    n_mutated = n_loads = n_refused = n_directories = 0
    while n_mutated < MUTATIONS // 4:
        root = tmp_path / str(n_directories)
        n_directories += 1
        shutil.copytree(sound, root)
        if index == "lost":
            (root / "index.db").unlink()
        n_mutated += mutate_some(root, dice, dice.choice((0.3, 0.9)))
        with Cache(block_size=SIZE, ram=ram, disk=root, watch=False) as cache:
            assert cache.disk_error is None
            n_loads += load_all(cache)
            # Refused blocks can be saved again and are then valid.
            cache.flush()
            save_all(cache)
            for tokens in contexts():
                with cache.lookup(NAMESPACE, tokens) as match:
                    assert match.n_tokens == len(tokens)
            assert load_all(cache) > n_loads // n_directories // 2
            cache.check_integrity()
            assert cache.counters()["faults"] == cache.counters()["disk_errors"] == 0
            n_refused += int(cache.counters()["corrupt_files"])
        shutil.rmtree(root)
    assert n_loads > 0
    assert n_refused > 0.8 * n_mutated


def test_no_wrong_payload_is_loaded_while_files_change(tmp_path: Path, sound: Path) -> None:
    """While a cache is open that watches the directory."""
    dice = random.Random("open")
    n_mutated = 0
    root = tmp_path / "kv"
    shutil.copytree(sound, root)
    with Cache(block_size=SIZE, ram=0, disk=root) as cache:
        while n_mutated < MUTATIONS // 4:
            n_mutated += mutate_some(root, dice, 0.3)
            load_all(cache)
            cache.flush()
            save_all(cache)
        load_all(cache)
        cache.flush()
        save_all(cache)
        for tokens in contexts():
            with cache.lookup(NAMESPACE, tokens) as match:
                assert match.n_tokens == len(tokens)
                assert all(cache.load(block) is not None for block in match.blocks)
        cache.check_integrity()
        assert cache.counters()["faults"] == cache.counters()["disk_errors"] == 0
        assert cache.counters()["corrupt_files"] > 0.5 * n_mutated
        assert len(list((root / "damaged").iterdir())) <= 8, "a few are kept for inspection"
