"""The harness, run on every kind of tier that there is; and shown to notice a cache that lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from erllama.cache import Block, Cache, FileTier, Tier, TierRow
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.backends.stub import StubBackend
from erllama.errors import CacheFormatError
from erllama.testing import BackendMachine, CacheMachine
from erllama.testing.models import TINY, write_gemma3, write_lfm2, write_llama, write_mamba
from support import llama_backend

EXAMPLES = int(os.environ.get("ERLLAMA_HARNESS_EXAMPLES", "40"))
# Nothing is shrunk: what a run finds depends on files and threads, and would take long to repeat.
MACHINE = settings(max_examples=EXAMPLES, stateful_step_count=30, phases=[Phase.generate])

SHELVES: dict[str, dict[bytes, tuple[Block, bytes]]] = {}


class DictTier(Tier):
    """A tier as a user writes one: what a remote store would be."""

    def __init__(self, place: str, budget: int = 10**6) -> None:
        super().__init__("remote", budget)
        self.shelf = SHELVES.setdefault(place, {})

    def rows(self) -> list[TierRow]:
        return [TierRow(block, len(payload), 0) for block, payload in self.shelf.values()]

    def write(self, block: Block, payload: memoryview) -> None:
        self.shelf[block.key] = (block, bytes(payload))

    def read(self, block: Block) -> tuple[Block, memoryview]:
        if block.key not in self.shelf:
            raise FileNotFoundError(block.key.hex())
        found, payload = self.shelf[block.key]
        return found, memoryview(payload)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.shelf.pop(key, None)


def machine(name: str, make: object, **attributes: object) -> type[CacheMachine]:
    return type(name, (CacheMachine,), {"make_cache": make, **attributes})


MACHINES = [
    machine("Ram", lambda self, d: Cache(ram=2000, block_size=16)),
    machine("Disk", lambda self, d: Cache(ram=0, disk=d, disk_quota=9000, block_size=16, watch=False)),
    machine("RamFile", lambda self, d: Cache(ram=0, ram_file=d, ram_file_quota=6000, block_size=16, watch=False)),
    machine("RamAndDisk", lambda self, d: Cache(ram=1000, disk=d, disk_quota=9000, block_size=16, watch=False)),
    machine(
        "Everything",
        lambda self, d: Cache(
            ram=1000,
            ram_file=d / "f",
            ram_file_quota=4000,
            disk=d / "d",
            disk_quota=9000,
            block_size=16,
            watch=False,
        ),
    ),
    machine(
        "TwoRoots",
        lambda self, d: Cache(ram=500, disk={d / "a": 4000, d / "b": 6000}, block_size=16, watch=False),
    ),
    machine(
        "Uncut",
        lambda self, d: Cache(ram=1000, disk=d, disk_quota=9000, block_size=16, watch=False),
        can_trim=False,
    ),
]


@pytest.mark.parametrize("kind", MACHINES, ids=lambda kind: kind.__name__)
def test_no_tier_lies(kind: type[CacheMachine]) -> None:
    run_state_machine_as_test(kind, settings=MACHINE)


def custom(self: CacheMachine, directory: Path) -> Cache:
    return Cache(
        ram=600, disk=directory, disk_quota=6000, tiers=[DictTier(str(directory))], block_size=16, watch=False
    )


def test_a_tier_of_ones_own_does_not_lie() -> None:
    run_state_machine_as_test(machine("Remote", custom, shared=False), settings=MACHINE)


class SwappingTier(FileTier):
    """Gives the payload of another block once it has two."""

    last: bytes = b""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        given, type(self).last = type(self).last or bytes(payload), bytes(payload)
        return found, memoryview(given)


class ForgetfulTier(FileTier):
    """Loses what it wrote."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.path_of(block.key).unlink()


class GreedyTier(FileTier):
    """Writes what it was not given room for."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        (self.root / "blocks" / "more.kvc").write_bytes(bytes(9000))


class LaxTier(FileTier):
    """Believes every file."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        try:
            return super().read(block)
        except CacheFormatError:
            return block, memoryview(self.path_of(block.key).read_bytes()[-96:] or b"x")


@pytest.mark.parametrize("liar", [SwappingTier, ForgetfulTier, GreedyTier, LaxTier])
def test_the_harness_notices_a_tier_that_lies(liar: type[FileTier]) -> None:
    def make(self: CacheMachine, directory: Path) -> Cache:
        return Cache(ram=0, tiers=[liar(directory, 9000, watch=False)], block_size=16)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine(liar.__name__, make), settings=settings(MACHINE, phases=[Phase.generate], max_examples=200)
        )


# --- backends ---------------------------------------------------------------------------------------

WRITERS = {"llama": (write_llama, TINY), "gemma3": (write_gemma3,), "mamba": (write_mamba,), "lfm2": (write_lfm2,)}


@pytest.mark.parametrize("can_trim", [True, False])
def test_the_stub_computes_alike_whatever_it_is_put_through(can_trim: bool) -> None:
    class Stub(BackendMachine):
        def make_backend(self) -> StubBackend:
            return StubBackend(n_ctx=64, can_trim=can_trim)

    run_state_machine_as_test(Stub, settings=MACHINE)


@pytest.mark.parametrize("kind", WRITERS)
def test_libllama_computes_alike_whatever_it_is_put_through(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.gguf"
    write, *shape = WRITERS[kind]
    write(path, *shape, seed=1)

    class Llama(BackendMachine):
        def make_backend(self) -> LlamaBackend:
            return llama_backend(path, n_ctx=256, n_ubatch=32)

    run_state_machine_as_test(Llama, settings=settings(MACHINE, max_examples=max(EXAMPLES // 4, 10)))


class Forgetting(StubBackend):
    """Restores all but the last position's KV rightly."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        self._kv[self._table[sequence, end - 1]] ^= np.uint64(1)


class Trusting(StubBackend):
    """Takes any payload."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        raw = bytes(payload).ljust(16 + 8 * (end - start), b"\0")
        super().restore(sequence, start, end, memoryview(raw))


@pytest.mark.parametrize("liar", [Forgetting, Trusting])
def test_the_harness_notices_a_backend_that_lies(liar: type[StubBackend]) -> None:
    class Machine(BackendMachine):
        def make_backend(self) -> StubBackend:
            return liar(n_ctx=64)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=settings(MACHINE, max_examples=200))
