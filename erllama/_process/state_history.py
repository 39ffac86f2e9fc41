"""What the processes of one model said about it: its state now, and the counts of all of them."""

from __future__ import annotations

from erllama._process.protocol import wire_types as w
from erllama._process.protocol.wire_values import add_metrics, pack_metrics
from erllama.engine import CacheHit, EngineMetrics


class StateHistory:
    """The state that the present process sent last, and the counts of earlier ones.

    The supervisor's thread writes it; any thread reads it.

    Attributes:
        current: what the present process sent last; None until it has loaded the model.
        last_hit: cache hit of the latest request; None before the first.
        n_refused: requests that were refused without asking a process.
    """

    def __init__(self) -> None:
        self.current: w.ModelState | None = None
        self.last_hit: CacheHit | None = None
        self.n_refused = 0
        self._past: w.WireMetrics | None = None

    def move(self, phase: str, pending: int, running: int) -> None:
        """Record what the model does now."""
        if self.current is not None:
            self.current = self.current.moved(phase, pending, running)

    def process_ended(self) -> None:
        """Keep the counts of a process that has ended."""
        if self.current is not None:
            self._past, self.current = pack_metrics(self._total()), None

    @property
    def metrics(self) -> EngineMetrics:
        """Counts of all processes."""
        total = self._total()
        total.refused += self.n_refused
        return total

    def _total(self) -> EngineMetrics:
        total, current = EngineMetrics(), self.current
        for metrics in (self._past, None if current is None else current.metrics):
            if metrics is not None:
                add_metrics(total, metrics)
        return total
