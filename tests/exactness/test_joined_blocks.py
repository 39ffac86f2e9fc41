"""Blocks restored together: the bits of blocks restored one by one, in any cells, and all or none of them."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.engine import Batch, PackedBlock
from erllama.engine.backends import llama
from erllama.engine.backends.llama import LlamaBackend
from erllama.errors import StateError
from erllama.llama_ffi import LlamaError
from support.recording_backend import llama_backend, prompt_of

ENDS = [0, 32, 64, 65, 80, 144, 160, 161, 200]
PROMPT = prompt_of(1, 230)
STATE_HEAD_BYTES = 16  # magic, sequence, streams, cells
CELL_BYTES = 12  # position, sequences, sequence


def decode(backend: LlamaBackend, sequence: int, start: int, tokens: NDArray[np.int32]) -> bytes:
    """Decode a slice, and return the bytes of its last row of logits."""
    n = len(tokens)
    positions = np.arange(start, start + n, dtype=np.int32)
    output = np.zeros(n, np.int8)
    output[-1] = 1
    return backend.decode(Batch(tokens, positions, np.full(n, sequence, np.int32), output)).tobytes()


def packed(backend: LlamaBackend, sequence: int = 0) -> list[PackedBlock]:
    """Compute a prompt in slices, pack each slice, and empty the sequence."""
    blocks = []
    for start, end in pairwise(ENDS):
        decode(backend, sequence, start, PROMPT[start:end])
        blocks.append(PackedBlock(start, end, memoryview(backend.pack(sequence, start, end).tobytes())))
    backend.drop(sequence)
    return blocks


def one_by_one(backend: LlamaBackend, sequence: int, blocks: list[PackedBlock]) -> None:
    for block in blocks:
        backend.restore(sequence, *block)


@pytest.fixture(params=["flash attention", "no flash attention", "q8_0 keys and values", "q4_0 keys"])
def backend(request: pytest.FixtureRequest, tiny_gguf: Path) -> Iterator[LlamaBackend]:
    """Layouts of a state: rows of V or, without flash attention, its transpose; several types."""
    options: dict[str, dict[str, object]] = {
        "flash attention": {"flash_attn": True},
        "no flash attention": {"flash_attn": False},
        "q8_0 keys and values": {"flash_attn": True, "kv_type_k": "q8_0", "kv_type_v": "q8_0"},
        "q4_0 keys": {"flash_attn": False, "kv_type_k": "q4_0"},
    }
    backend = llama_backend(tiny_gguf, n_ctx=512, n_ubatch=64, n_sequences=4, **options[request.param])
    yield backend
    backend.close()


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of states of each joined state."""
    joined: list[int] = []
    set_states = llama.llama_ffi.LlamaContext.set_states

    def record(self: llama.llama_ffi.LlamaContext, sequence: int, states: list[memoryview]) -> None:
        set_states(self, sequence, states)
        joined.append(len(states))

    monkeypatch.setattr(llama.llama_ffi.LlamaContext, "set_states", record)
    return joined


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 20])
@pytest.mark.parametrize("n_held", [0, 3])
def test_joined_blocks_have_the_bits_of_single_ones(
    backend: LlamaBackend, joins: list[int], limit: int, n_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "_JOINED_BYTES", limit)
    blocks = packed(backend)
    one_by_one(backend, 0, blocks)
    state, logits = backend.pack(0, 0, 200).tobytes(), decode(backend, 0, 200, PROMPT[200:])
    backend.clear()
    one_by_one(backend, 0, blocks[:n_held])
    backend.restore_blocks(0, blocks[n_held:])
    assert backend.pack(0, 0, 200).tobytes() == state
    assert decode(backend, 0, 200, PROMPT[200:]) == logits
    assert bool(joins) == (limit > 1)
    if limit == 1 << 20:
        assert joins == [len(blocks) - n_held]


def test_large_blocks_are_restored_alone(
    backend: LlamaBackend, joins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks of 32, 32, 1, 15, 64, 16, 1 and 39 tokens, the one of 64 is too large to be joined."""
    blocks = packed(backend)
    monkeypatch.setattr(llama, "_SMALL_BLOCK_BYTES", blocks[4].payload.nbytes - 1)
    one_by_one(backend, 0, blocks)
    state = backend.pack(0, 0, 200).tobytes()
    backend.drop(0)
    backend.restore_blocks(0, blocks)
    assert joins == [4, 3]
    assert backend.pack(0, 0, 200).tobytes() == state


def test_blocks_of_backends_with_other_numbers_of_sequences_are_joined(
    tiny_gguf: Path, backend: LlamaBackend, joins: list[int]
) -> None:
    """A state names the sequence that it was read from, which differs between such backends."""
    other = llama_backend(tiny_gguf, **{**dataclasses.asdict(backend._options), "n_sequences": 2})
    try:
        blocks = [
            mine if i % 2 else theirs
            for i, (mine, theirs) in enumerate(zip(packed(backend), packed(other), strict=True))
        ]
    finally:
        other.close()
    assert bytes(blocks[0].payload[4:8]) != bytes(blocks[1].payload[4:8])
    one_by_one(backend, 0, blocks)
    backend.restore_blocks(1, blocks)
    assert joins == [len(blocks)]
    assert backend.pack(1, 0, 200).tobytes() == backend.pack(0, 0, 200).tobytes()


def test_joined_blocks_fit_scattered_cells(backend: LlamaBackend, joins: list[int]) -> None:
    """Take every other cell of a full context, and restore into the cells between."""
    blocks = packed(backend)
    one_by_one(backend, 0, blocks)
    state = backend.pack(0, 0, 200).tobytes()
    backend.clear()
    for at in range(256):
        for sequence in (1, 2):
            decode(backend, sequence, at, PROMPT[at % 200 :][:1])
    other = backend.pack(1, 0, 256).tobytes()
    backend.drop(2)
    backend.restore_blocks(3, blocks)
    assert joins
    assert backend.pack(3, 0, 200).tobytes() == state
    assert backend.pack(1, 0, 256).tobytes() == other, "no other sequence changes"


def damage_type(raw: bytearray, n: int) -> None:
    """Change the type of the first layer's keys, which only libllama checks."""
    struct.pack_into("<i", raw, STATE_HEAD_BYTES + CELL_BYTES * n + 8, 30)


def damage_layers(raw: bytearray, n: int) -> None:
    struct.pack_into("<I", raw, STATE_HEAD_BYTES + CELL_BYTES * n + 4, 77)


def damage_row_size(raw: bytearray, n: int) -> None:
    struct.pack_into("<Q", raw, STATE_HEAD_BYTES + CELL_BYTES * n + 12, 2**63)


def cut_off(raw: bytearray, n: int) -> None:
    del raw[-3:]


def append(raw: bytearray, n: int) -> None:
    raw += b"\0\0\0"


def move(raw: bytearray, n: int) -> None:
    """Shift the first position."""
    struct.pack_into("<i", raw, STATE_HEAD_BYTES, 500)


DAMAGES = [damage_type, damage_layers, damage_row_size, cut_off, append, move]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.parametrize("n_held", [0, 2])
def test_a_refused_payload_among_others_changes_nothing(
    backend: LlamaBackend, damage: Callable[[bytearray, int], None], at: int, n_held: int
) -> None:
    blocks = packed(backend)
    decode(backend, 1, 0, PROMPT[:40])
    one_by_one(backend, 0, blocks[:n_held])
    before = [backend.pack(0, 0, ENDS[n_held]).tobytes() if n_held else b"", backend.pack(1, 0, 40).tobytes()]
    raw = bytearray(blocks[max(at, n_held)].payload)
    start, end = ENDS[max(at, n_held)], ENDS[max(at, n_held) + 1]
    damage(raw, end - start)
    wrong = [*blocks]
    wrong[max(at, n_held)] = PackedBlock(start, end, memoryview(raw))
    with pytest.raises(StateError):
        backend.restore_blocks(0, wrong[n_held:])
    after = [backend.pack(0, 0, ENDS[n_held]).tobytes() if n_held else b"", backend.pack(1, 0, 40).tobytes()]
    assert after == before
    backend.restore_blocks(0, blocks[n_held:])  # also: no cell is lost
    one_by_one(backend, 2, blocks)
    assert backend.pack(0, 0, 200).tobytes() == backend.pack(2, 0, 200).tobytes()


@pytest.mark.parametrize("limit", [20_000, 1 << 20])
def test_joined_blocks_without_room_change_nothing(
    tiny_gguf: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "_JOINED_BYTES", limit)
    backend = llama_backend(tiny_gguf, n_ctx=256, n_ubatch=64, n_sequences=4)
    blocks = packed(backend)
    decode(backend, 1, 0, PROMPT[:100])
    one_by_one(backend, 0, blocks[:1])
    with pytest.raises(StateError):
        backend.restore_blocks(0, blocks[1:])
    backend.cut(1, 55)  # room for one more token
    backend.restore_blocks(0, blocks[1:])
    assert decode(backend, 0, 200, PROMPT[200:201])
    backend.close()


def test_blocks_that_do_not_follow_each_other_are_refused(backend: LlamaBackend) -> None:
    blocks = packed(backend)
    for wrong in (blocks[1:], blocks[::-1], [blocks[0], blocks[2]], [blocks[0], blocks[0]]):
        with pytest.raises(StateError):
            backend.restore_blocks(0, wrong)
    backend.restore_blocks(0, blocks)


def test_states_that_cannot_be_joined_empty_the_sequence(backend: LlamaBackend) -> None:
    context, blocks = backend._context, packed(backend)
    states = [block.payload for block in blocks]
    with pytest.raises(LlamaError, match="at least one"):
        context.set_states(0, [])
    with pytest.raises(LlamaError, match="outside"):
        context.set_states(99, states)
    for wrong in ([states[0], states[1][:-1]], [states[0], memoryview(b"")], [memoryview(bytes(100))] * 2):
        context.set_states(0, states)
        with pytest.raises(LlamaError, match="cannot be joined"):
            context.set_states(0, wrong)
        assert context.last_position(0) == -1
    context.set_states(0, states[:1])
    assert context.last_position(0) == ENDS[1] - 1


# --- in the engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_refused_block_is_found_and_the_rest_is_computed(
    tiny_gguf: Path, tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Save a block whose payload does not fit the model, with valid checksums."""

    def pack(self: LlamaBackend, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        raw = bytearray(real_pack(self, sequence, start, end).tobytes())
        if start == 80:
            damage_type(raw, end - start)
        return np.frombuffer(raw, np.uint8)

    real_pack = LlamaBackend.pack
    places: dict[str, object] = {"ram": 0, "disk": tmp_path} if tier == "disk" else {}
    with (
        Cache(block_size=16, **places) as cache,  # type: ignore[arg-type]
        erllama.load_model(tiny_gguf, cache=cache, n_ctx=512, n_threads=1) as model,
    ):

        def complete() -> erllama.Completion:
            model.evict()
            cache.flush()
            return model.complete(PROMPT.tolist(), max_tokens=8, temperature=0)

        monkeypatch.setattr(LlamaBackend, "pack", pack)
        cold = complete()
        monkeypatch.undo()
        warm = complete()
        assert warm.tokens == cold.tokens
        assert (warm.cache.tokens, warm.cache.tier) == (80, tier), "the blocks before the refused one"
        assert cache.counters()["restore_errors"] == 1
        assert complete().cache.tokens == len(PROMPT) - 1, "the refused block was stored anew"
        assert cache.counters()["restore_errors"] == 1
