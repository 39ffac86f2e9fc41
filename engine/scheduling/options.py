"""Options of how a model serves several requests at once, and their values for one backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from erllama.checks import integer
from erllama.engine.backend import Limits


class SchedulerSizes(NamedTuple):
    """Checked sizes of a scheduler; see `load_model` for the meaning of each."""

    n_seq_max: int
    prefill_chunk_size: int
    parked_cells: int
    max_pending: int


@dataclass(frozen=True, slots=True)
class SchedulingOptions:
    """The options as a caller passed them; None for a default that depends on the backend.

    Attributes: see `load_model`.
    """

    n_seq_max: int | None
    prefill_chunk_size: int | None
    parked_cells: int | None
    max_pending: int

    def for_limits(self, limits: Limits) -> SchedulerSizes:
        """Return the sizes for a backend with these limits.

        Raises:
            OptionError: a value has the wrong type or is out of range.
        """
        n_seq_max = min(4, limits.n_sequences, limits.n_batch) if self.n_seq_max is None else self.n_seq_max
        chunk = self.prefill_chunk_size
        if chunk is None:
            chunk = min(max(64, limits.n_batch // 4), limits.n_batch)
        parked = limits.n_ctx // 8 if self.parked_cells is None else self.parked_cells
        return SchedulerSizes(
            integer("n_seq_max", n_seq_max, 1, min(limits.n_sequences, limits.n_batch)),
            integer("prefill_chunk_size", chunk, 1, limits.n_batch),
            integer("parked_cells", parked, 0, limits.n_ctx),
            integer("max_pending", self.max_pending, 1),
        )
