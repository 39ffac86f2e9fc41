"""The cache in a model's process, as a member of the parent's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from erllama._process.calls import ProcessEnded
from erllama._process.protocol import messages as m
from erllama.cache import MemberReport
from erllama.errors import Error

_ANSWER_SECONDS = 5.0  # to wait for a process that may hang


class ProcessCache:
    """The cache of one process. A `CacheMember`. Thread-safe.

    Args:
        call: calls the process, as `ProcessRunner.call_once`.
        is_running: whether the process runs and answers.
    """

    def __init__(
        self, call: Callable[[Callable[[int], m.AnyCall], float], m.Returned], is_running: Callable[[], bool]
    ) -> None:
        self._call, self._is_running = call, is_running
        self._last = MemberReport()
        self._ended = False

    def update(self, counters: Mapping[str, int | float]) -> None:
        """Record counters that the process sent by itself."""
        last = self._last
        self._last = MemberReport(counters, last.tiers, last.rows)

    def end(self) -> None:
        """Note that the process has ended: only its counts remain."""
        self._ended = True
        self._last = MemberReport(self._last.counters)

    def report(self, wait: bool) -> MemberReport:
        """Return the report of the process; the last one if it has ended or is not to be waited for."""
        if not wait or self._ended or not self._is_running():
            return self._last
        try:
            report = self._call(m.ReportCache, _ANSWER_SECONDS).report
        except (Error, ProcessEnded):
            return self._last
        return self._record(report)

    def _record(self, report: dict[str, object] | None) -> MemberReport:
        if report is not None and not self._ended:
            self._last = MemberReport.of_plain(report)
        return self._last

    def flush(self, timeout: float | None) -> bool:
        """Write all blocks that wait there; False if that took too long."""
        if self._ended or not self._is_running():
            return True
        with suppress(ProcessEnded):
            seconds = math.inf if timeout is None else timeout + _ANSWER_SECONDS
            returned = self._call(lambda number: m.FlushCache(number, timeout), seconds)
            self._record(returned.report)
            return returned.flag
        return False

    def evict_bytes(self, n_bytes: int, tiers: Sequence[str]) -> int:
        """Free at least `n_bytes` of these tiers there. Returns the bytes freed."""
        if self._ended or not self._is_running():
            return 0
        with suppress(ProcessEnded):
            return self._call(lambda number: m.EvictBytes(number, n_bytes, tuple(tiers)), _ANSWER_SECONDS).number
        return 0
