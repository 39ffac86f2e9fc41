"""What a model is told when it is loaded, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from erllama.checks import integer
from erllama.engine import Limits, ModelFacts, Phase


@dataclass(frozen=True, slots=True)
class Shape:
    """How a model serves many at once; None for what fits the backend.

    Attributes: see `load_model`.
    """

    n_seq_max: int | None
    prefill_chunk_size: int | None
    parked_cells: int | None
    max_pending: int

    def for_limits(self, limits: Limits) -> Shape:
        """Checked, and with nothing left open.

        Raises:
            OptionError: a value is ill-typed or out of range.
        """
        n_seq_max = min(4, limits.n_sequences, limits.n_batch) if self.n_seq_max is None else self.n_seq_max
        chunk = self.prefill_chunk_size
        if chunk is None:
            chunk = min(max(64, limits.n_batch // 4), limits.n_batch)
        parked = limits.n_ctx // 8 if self.parked_cells is None else self.parked_cells
        return Shape(
            integer("n_seq_max", n_seq_max, 1, min(limits.n_sequences, limits.n_batch)),
            integer("prefill_chunk_size", chunk, 1, limits.n_batch),
            integer("parked_cells", parked, 0, limits.n_ctx),
            integer("max_pending", self.max_pending, 1),
        )


@dataclass(frozen=True, slots=True)
class Device:
    """A device that libllama can compute on.

    Attributes:
        name: as "CPU" or "CUDA0"; what `load_model(devices=...)` takes.
        description: of the hardware, as its driver words it.
        kind: "cpu"; "gpu", with memory of its own; "igpu", with the machine's; "accel", which helps the CPU.
        free_bytes, total_bytes: its memory when it was asked; 0 where its driver does not tell.
    """

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int


def devices() -> list[Device]:
    """The devices that this build of libllama sees, the CPU among them; no model need be loaded.

    Raises:
        LibraryNotBuilt: the package was not built.
        BackendError: libllama cannot be started, as in a process forked from one that used it.
    """
    # Imported here: the cache and custom backends work where libllama was never built.
    from erllama.engine.backends.llama_library import devices as seen

    return [Device(d.name, d.description, d.kind, d.free_bytes, d.total_bytes) for d in seen()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo(ModelFacts):
    """What a loaded model is, and how it stands.

    Attributes:
        id: its name in this process.
        backend: what computes it, as "llama".
        description: what it is, in the backend's words; empty where it has none.
        vocab_only: whether it was loaded for its vocabulary alone.
        n_ctx: cells of its context, in tokens.
        n_vocab: size of its vocabulary.
        n_seq_max: most requests that run at once.
        phase, pending, queue_depth: as of the model.
        cache_problem: why its KV is neither saved nor taken from the cache: a file that it maps was changed. Empty
            where the cache is used.

    The rest, from `architecture` on, as of `ModelFacts`: empty and 0 for a backend that does not tell.
    """

    id: str
    backend: str
    description: str
    vocab_only: bool
    n_ctx: int
    n_vocab: int
    n_seq_max: int
    phase: Phase
    pending: int
    queue_depth: int
    cache_problem: str = ""
