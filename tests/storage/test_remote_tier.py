"""A remote tier in a mounted directory."""

from __future__ import annotations

from pathlib import Path

from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from erllama.cache import Cache, Tier
from erllama.cache.blocks.key_file import SecretKeys
from erllama.cache.remote.directory_store import DirectoryStore
from erllama.cache.remote.tier import RemoteTier
from erllama.testing import CacheMachine, TierConformance

KEYS = SecretKeys((b"k" * 32,))
MACHINE = settings(max_examples=25, stateful_step_count=30, phases=[Phase.generate])


class TestRemoteTier(TierConformance):
    n_blocks = 60

    def make_tier(self, directory: Path) -> Tier:
        return RemoteTier(DirectoryStore(directory / "bucket"), str(directory / "bucket"), KEYS, 10**6)


def machine_cache(self: CacheMachine, directory: Path) -> Cache:
    tier = RemoteTier(DirectoryStore(directory / "bucket"), str(directory / "bucket"), KEYS, 12000)
    return Cache(ram=600, disk=directory / "disk", disk_quota=6000, tiers=[tier], block_size=16, watch=False)


def test_the_state_machine_passes_with_a_remote_tier() -> None:
    kind = type("Remote", (CacheMachine,), {"make_cache": machine_cache, "shared": False, "n_blocks": 40})
    run_state_machine_as_test(kind, settings=MACHINE)
