"""The harness passes every kind of tier and backend, and finds each of many seeded faults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from erllama.cache import Block, Cache, CacheSpec, Changes, FileTier, RamTier, Tier
from erllama.cache.sharing.spec import RootSpec
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.backends.stub import StubBackend
from erllama.errors import CacheFormatError
from erllama.testing import BackendMachine, CacheMachine, TierConformance
from erllama.testing.models import TINY, write_gemma3, write_lfm2, write_llama, write_mamba
from support.faulty.backends import (
    BACKEND_FAULTS,
    RARE_BACKEND_FAULTS,
    CutsFirst,
    DecodesSecond,
    DropsNext,
    EmbedsBackwards,
    PacksStale,
    RestoresFrom32,
    RestoresInFirst,
    SharesForty,
    Trusts,
    WipesBatch,
)
from support.faulty.tiers import (
    FAULTY_TIERS,
    ForgetsAtClose,
    KeepsAll,
    KeepsOld,
    ListsTwice,
    ListsWrongSizes,
    ReadsForOneThread,
    ReadsOther,
    ReadsShort,
    SmallTier,
)
from support.paths import ROOT
from support.recording_backend import llama_backend

GUIDE = ROOT / "docs" / "test-harness.md"
EXAMPLES = int(os.environ.get("ERLLAMA_HARNESS_EXAMPLES", "12"))
# Without shrinking: a failure depends on files and threads, and repeating it takes long.
MACHINE = settings(max_examples=EXAMPLES, stateful_step_count=30, phases=[Phase.generate])


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
        "OtherProcess",
        lambda self, d: Cache.of_spec(
            CacheSpec(
                0,
                (RootSpec("ram_file", str(d / "f"), 4000, False), RootSpec("disk", str(d / "d"), 9000, False)),
                16,
                10**6,
                False,
            )
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
def test_every_kind_of_cache_passes(kind: type[CacheMachine]) -> None:
    run_state_machine_as_test(kind, settings=MACHINE)


class TestRamTier(TierConformance):
    def make_tier(self, directory: Path) -> Tier:
        return RamTier(10**6)


class TestFileTier(TierConformance):
    """With the name of a tier in memory: durable writes would take most of the time."""

    n_blocks = 40
    shared = True

    def make_tier(self, directory: Path) -> Tier:
        return FileTier(directory / "cache", 10**6, name="ram_file", watch=False)


class TestSmallTier(TierConformance):
    def make_tier(self, directory: Path) -> Tier:
        return SmallTier(str(directory))


class TestTinyTier(TierConformance):
    """Few blocks fit."""

    def make_tier(self, directory: Path) -> Tier:
        return SmallTier(str(directory), 600)


def custom(self: CacheMachine, directory: Path) -> Cache:
    return Cache(
        ram=600, disk=directory, disk_quota=6000, tiers=[SmallTier(str(directory))], block_size=16, watch=False
    )


def test_a_user_defined_tier_passes() -> None:
    run_state_machine_as_test(machine("Remote", custom, shared=False), settings=MACHINE)


class SwappingTier(FileTier):
    """From the second payload on, `read()` returns that of the first block."""

    last: bytes = b""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        given, type(self).last = type(self).last or bytes(payload), bytes(payload)
        return found, memoryview(given)


class ForgetfulTier(FileTier):
    """`write()` removes the file that it wrote."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.path_of(block.key).unlink()


class GreedyTier(FileTier):
    """`write()` writes a second file without a reservation."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        (self.root / "blocks" / "more.kvc").write_bytes(bytes(9000))


class LaxTier(FileTier):
    """`read()` accepts every file."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        try:
            return super().read(block)
        except CacheFormatError:
            return block, memoryview(self.path_of(block.key).read_bytes()[-96:] or b"x")


class UnawareTier(FileTier):
    """`changes()` reports nothing."""

    def changes(self) -> Changes | None:
        return None


FAULTY_FILE_TIERS: list[tuple[type[FileTier], str]] = [
    (SwappingTier, "test_read_returns_what_was_written"),
    (ForgetfulTier, "test_read_returns_what_was_written"),
    (GreedyTier, "test_a_sound_tier_has_no_problems"),
    (LaxTier, "test_damage_is_detected"),
    (UnawareTier, "test_instances_see_each_others_changes"),
]


@pytest.mark.parametrize(("faulty", "rule"), FAULTY_FILE_TIERS)
def test_a_rule_finds_a_fault_of_a_file_tier(faulty: type[FileTier], rule: str) -> None:
    class Rules(TestFileTier):
        def make_tier(self, directory: Path) -> Tier:
            return faulty(directory / "cache", 10**6, name="ram_file", watch=False)

    with pytest.raises(AssertionError):
        getattr(Rules(), rule)()


@pytest.mark.parametrize(("faulty", "rule"), FAULTY_TIERS)
def test_each_rule_finds_its_faulty_tier(faulty: type[SmallTier], rule: str) -> None:
    class Rules(TierConformance):
        def make_tier(self, directory: Path) -> Tier:
            return faulty(str(directory))

    with pytest.raises(AssertionError):
        getattr(Rules(), rule)()


def test_every_tier_rule_has_a_faulty_tier() -> None:
    rules = {name for name in dir(TierConformance) if name.startswith("test_")}
    assert rules == {rule for _, rule in [*FAULTY_TIERS, *FAULTY_FILE_TIERS]}


def faulty_machine(faulty: type[SmallTier], budget: int) -> type[CacheMachine]:
    def make(self: CacheMachine, directory: Path) -> Cache:
        return Cache(ram=300, tiers=[faulty(str(directory), budget)], block_size=16, watch=False)

    return machine(faulty.__name__, make, shared=False)


# The machine checks all rules first, so it finds every fault that a rule finds. These are a few of each kind.
@pytest.mark.parametrize("faulty", [KeepsAll, ReadsShort, ListsTwice, KeepsOld, ListsWrongSizes, ReadsForOneThread])
def test_the_machine_names_the_rule_that_a_tier_breaks(faulty: type[SmallTier]) -> None:
    with pytest.raises(AssertionError, match="Broken rule"):
        run_state_machine_as_test(faulty_machine(faulty, 10**6), settings=settings(MACHINE, max_examples=1))


@pytest.mark.parametrize(
    "faulty",
    [KeepsAll, ReadsShort, ListsTwice, KeepsOld, ListsWrongSizes, ForgetsAtClose, ReadsOther],
)
def test_the_state_machine_finds_faulty_tiers_without_the_rules(
    faulty: type[SmallTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheMachine, "_check_tiers", lambda self: None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(faulty_machine(faulty, 2000), settings=settings(MACHINE, max_examples=40))


# --- backends ---------------------------------------------------------------------------------------

WRITERS = {"llama": (write_llama, TINY), "gemma3": (write_gemma3,), "mamba": (write_mamba,), "lfm2": (write_lfm2,)}


@pytest.mark.parametrize("can_trim", [True, False])
def test_the_stub_computes_the_same_after_any_calls(can_trim: bool) -> None:
    class Stub(BackendMachine):
        def make_backend(self) -> StubBackend:
            return StubBackend(n_ctx=64, can_trim=can_trim)

    run_state_machine_as_test(Stub, settings=settings(MACHINE, max_examples=max(EXAMPLES // 2, 5)))


@pytest.mark.parametrize("kind", WRITERS)
def test_libllama_computes_the_same_after_any_calls(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.gguf"
    write, *shape = WRITERS[kind]
    write(path, *shape, seed=1)

    class Llama(BackendMachine):
        checks_rules = False  # tests/harness/test_backends.py checks them

        def make_backend(self) -> LlamaBackend:
            return llama_backend(path, n_ctx=256, n_ubatch=32, n_threads=1)

    run_state_machine_as_test(Llama, settings=settings(MACHINE, max_examples=max(EXAMPLES // 5, 5)))


@pytest.mark.parametrize("faulty", [SharesForty, PacksStale, RestoresFrom32, WipesBatch, EmbedsBackwards])
def test_the_machine_names_the_rule_that_a_backend_breaks(faulty: type[StubBackend]) -> None:
    class Machine(BackendMachine):
        def make_backend(self) -> StubBackend:
            return faulty(n_ctx=300)

    with pytest.raises(AssertionError, match="Broken rule"):
        run_state_machine_as_test(Machine, settings=settings(MACHINE, max_examples=1))


@pytest.mark.parametrize("faulty", [RestoresInFirst, DecodesSecond, CutsFirst, DropsNext, Trusts])
def test_the_state_machine_finds_faulty_backends_without_the_rules(faulty: type[StubBackend]) -> None:
    class Machine(BackendMachine):
        checks_rules = False

        def make_backend(self) -> StubBackend:
            return faulty(n_ctx=300)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=settings(MACHINE, max_examples=40))


# --- the guide ------------------------------------------------------------------------------------------


def table(faults: Sequence[tuple[type, str]]) -> str:
    """Return the table of faults and rules as in the guide."""
    rows = [f"| {' '.join((fault.__doc__ or '').split())} | `{rule}` |" for fault, rule in faults]
    return "\n".join(["| Fault | Rule that finds it |", "|---|---|", *rows])


@pytest.mark.parametrize(
    "faults",
    [[*FAULTY_TIERS, *FAULTY_FILE_TIERS], [*BACKEND_FAULTS, *RARE_BACKEND_FAULTS]],
    ids=["tiers", "backends"],
)
def test_the_guide_lists_the_faults(faults: Sequence[tuple[type, str]]) -> None:
    assert len({fault for fault, _ in faults}) >= 40
    assert table(faults) in GUIDE.read_text(), f"docs/test-harness.md must have this table:\n{table(faults)}"
