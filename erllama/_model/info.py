"""Descriptions of devices and of loaded models: `devices()`, `Device` and `ModelInfo`."""

from __future__ import annotations

from dataclasses import dataclass

from erllama.engine import ModelFacts, Phase


@dataclass(frozen=True, slots=True)
class Device:
    """A device that libllama can compute on.

    Attributes:
        name: such as "CPU" or "CUDA0"; `load_model(devices=...)` takes it.
        description: the driver's description of the hardware.
        kind: "cpu"; "gpu" with its own memory; "igpu", which shares the machine's memory; "accel", which assists
            the CPU.
        free_bytes, total_bytes: the device's memory at the time of the call; 0 if its driver does not report it, or
            if it is a device of an RPC server that no model uses.
    """

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int


def devices() -> list[Device]:
    """Return the devices that this build of libllama can use, including the CPU. Needs no loaded model.

    Raises:
        LibraryNotBuilt: the package was not built.
        BackendError: libllama cannot start, for example in a process forked from one that used it.
    """
    # Imported here, because the cache and custom backends work without a built libllama.
    from erllama.engine.backends.llama_library import devices as library_devices

    return [Device(d.name, d.description, d.kind, d.free_bytes, d.total_bytes) for d in library_devices()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo(ModelFacts):
    """Properties and current state of a loaded model.

    Attributes:
        id: the model's name in this process.
        backend: name of the backend, such as "llama".
        description: the backend's description of the model; empty if it has none.
        vocab_only: whether the model was loaded for its vocabulary alone.
        n_ctx: size of the context in tokens.
        n_vocab: size of the vocabulary in tokens.
        n_seq_max: maximum number of requests that run at once.
        phase, pending, queue_depth: as the attributes of `Model`.
        cache_problem: why the model neither saves KV to the cache nor takes KV from it: a file that it maps was
            changed. Empty while the cache is used.
        pid: number of the process that computes: this one, or the model's own; 0 while that is being replaced.

    The other attributes are those of `ModelFacts`. They are empty or 0 if the backend does not report them.
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
    pid: int = 0
