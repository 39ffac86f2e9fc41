"""Caches of other processes as members of a cache, and live tiers, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

from erllama.cache import Block, Cache, CacheSpec, MemberReport, Tier, TierRow


class Live(Tier):
    """A live tier as the engine has one: it reports its blocks, and the cache asks it to evict some."""

    write_mode = "external"

    def __init__(self, budget: int) -> None:
        super().__init__("live", budget)
        self.given_up: list[bytes] = []

    def rows(self) -> list[TierRow]:
        return []

    def write(self, block: Block, payload: memoryview) -> None:
        raise AssertionError("nobody writes to it")

    def read(self, block: Block) -> tuple[Block, memoryview]:
        raise AssertionError("nobody reads from it")

    def remove(self, keys: Sequence[bytes]) -> None:
        self.given_up.extend(keys)


def through_message(value: object) -> object:
    """Return a value as another process receives it: plain values only, with lists for tuples."""
    if isinstance(value, dict):
        return {through_message(name): through_message(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [through_message(item) for item in value]
    assert type(value) in (str, bytes, int, float, bool, type(None)), f"{value!r} is not a plain value"
    return value


def sent(spec: CacheSpec) -> CacheSpec:
    """Return a spec as another process receives it."""
    return CacheSpec.of_plain(through_message(spec.as_plain()))  # type: ignore[arg-type]


class Member:
    """A member whose cache is in this process. It stands for a process that runs a model.

    Attributes:
        error: raised by each call, if set.
        calls: the calls, with their arguments.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.error: Exception | None = None
        self.calls: list[tuple[object, ...]] = []
        self.last = MemberReport()

    def report(self, wait: bool) -> MemberReport:
        self._call("report", wait)
        if wait:
            plain = through_message(self.cache.member_report().as_plain())
            self.last = MemberReport.of_plain(plain)  # type: ignore[arg-type]
        return self.last

    def flush(self, timeout: float | None) -> bool:
        self._call("flush", timeout)
        return self.cache.flush(timeout)

    def evict_bytes(self, n_bytes: int, tiers: Sequence[str]) -> int:
        self._call("evict_bytes", n_bytes, tiers)
        return self.cache.evict_bytes(n_bytes, tiers)

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
