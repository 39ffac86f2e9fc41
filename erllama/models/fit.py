"""Whether a model fits the free memory, and with how much context.

`load_model` refuses a model that cannot fit, and finds the context of `n_ctx="fit"`. `erllama fit`, `erllama
models` and the server use the same numbers. The estimates are those of `engine.backends.memory_estimate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from erllama.cache.pressure.memory import available_memory
from erllama.cache.sizes import format_size
from erllama.checks import choice, integer, reject_unknown, shown
from erllama.errors import MemoryLimitExceeded, ModelLoadError, OptionError
from erllama.models.names import model_path

if TYPE_CHECKING:
    from erllama.engine.backends.llama_library import llama_ffi
    from erllama.engine.backends.memory_estimate import MemoryEstimate, ModelHeader

FIT = "fit"  # the value of `n_ctx` that stands for the largest context that fits
# Of the free memory, what a model may use with n_ctx="fit". The rest is for the process itself, and for prompts
# that the cache keeps in RAM.
USABLE = 0.9
KV_TYPES = ("f16", "q8_0", "q4_0")  # the usual ones, in the order of their size
_STEP = 256  # tokens; the context is rounded up to a multiple
_LARGEST_N_CTX = 1 << 24
_MEMORY_OPTIONS = (
    "n_ctx",
    "n_seq_max",
    "n_batch",
    "n_ubatch",
    "kv_type_k",
    "kv_type_v",
    "flash_attn",
    "swa_full",
    "mmap",
    "overrides",
    "devices",
    "n_gpu_layers",
    "split_mode",
    "main_gpu",
    "tensor_split",
    "mlock",
)


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model fits the free memory.

    Attributes:
        path: its file.
        estimate: the memory that it needs, as a `MemoryEstimate` in bytes: `weights`, `kv`, `state`, `compute`,
            `total`, and `least`, which must be free; and the size `n_ctx` of its context in tokens.
        free: bytes of memory that are free for it: those of this machine within the limits of its cgroups, and
            those of the GPUs that hold its layers.
        n_ctx_train: the context that the model was trained with, in tokens; 0 if its file does not say.
        largest_n_ctx: the largest context in tokens that fits nine tenths of the free memory, at most n_ctx_train,
            by the type of its KV: the asked type, and smaller ones that the model can use. 0 if none fits. If GPUs
            hold all layers, their memory alone counts. Empty if they hold some layers, or their memory is unknown.
    """

    path: Path
    estimate: MemoryEstimate
    free: int
    n_ctx_train: int
    largest_n_ctx: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether the model passes the check of `load_model` with the asked options."""
        return self.estimate.least <= self.free


def fit_model(model: str | Path, **options: object) -> Fit:
    """Return whether a model fits the free memory. Reads the header of its file only.

    Args:
        model: the path or the name of a model.
        options: of `load_model`, by name: those that change memory. With n_ctx="fit", the estimate is for the
            largest context that fits.

    Raises:
        ModelNameError: no local model has the name.
        ModelLoadError: the file is missing, or is not GGUF.
        OptionError: an option is unknown or wrong, or n_ctx="fit" and GPUs hold some of the layers.
        MemoryLimitExceeded: n_ctx="fit", and no context fits.
    """
    unknown = {name: value for name, value in options.items() if name not in _MEMORY_OPTIONS}
    reject_unknown(unknown, _MEMORY_OPTIONS, "fit_model")
    for name in ("n_ctx", "n_seq_max", "n_batch", "n_ubatch"):
        if options.get(name) is not None and not (name == "n_ctx" and options[name] == FIT):
            integer(name, options[name], 1)
    from erllama.engine.backends.memory_estimate import KV_BYTES

    for name in ("kv_type_k", "kv_type_v"):
        choice(name, options.get(name, "f16"), tuple(KV_BYTES))
    path = model_path(model)
    header, free = _header(path), free_memory(options)
    room = _room(header, options)
    asked = str(options.get("kv_type_k", "f16"))
    kinds = [asked, *(kind for kind in _usable_types(header, options) if KV_BYTES[kind] < KV_BYTES[asked])]
    largest = (
        {}
        if room is None
        else {kind: largest_n_ctx(header, _with_type(options, kind, asked), int(USABLE * room)) for kind in kinds}
    )
    if options.get("n_ctx") == FIT:
        options = {**options, "n_ctx": _checked_fit(path, header, options, room)}
    return Fit(path, header.estimate(options), free, header.n_ctx_train, largest)


def free_memory(options: Mapping[str, object]) -> int:
    """Return the free memory for a model: of the machine within its cgroups' limits, and of GPUs that it uses."""
    from erllama.engine.backends.memory_estimate import layer_devices

    of_gpus = sum(device.free_bytes for device in layer_devices(options) if not _shares_memory(device))
    return available_memory() + of_gpus


def _shares_memory(device: llama_ffi.Device) -> bool:
    """Return whether a device uses the machine's memory: an integrated GPU, or that of an Apple processor."""
    return device.kind == "igpu" or device.name.startswith("MTL")


def _room(header: ModelHeader, options: Mapping[str, object]) -> int | None:
    """Return the free memory that bounds the context of a model; None if it is unknown.

    If GPUs hold all layers, the KV is in their memory, too, and the machine's memory does not help.
    """
    from erllama.engine.backends.memory_estimate import layer_devices

    devices, machine = layer_devices(options), available_memory()
    if not devices:
        return machine
    if not header.is_on_devices(options) or any(
        not device.total_bytes and not _shares_memory(device) for device in devices
    ):
        return None
    sizes = [
        min(machine, device.free_bytes or machine) if _shares_memory(device) else device.free_bytes
        for device in devices
    ]
    shares = cast("Sequence[float] | None", options.get("tensor_split"))
    if shares is None:  # libllama divides the layers by free memory
        return sum(sizes)
    return int(min(size * sum(shares) / share for size, share in zip(sizes, shares, strict=True) if share))


def check_fits(path: Path, options: Mapping[str, object]) -> None:
    """Check that a model can fit the free memory. Does nothing if RPC servers hold a part of it.

    Mapped weights do not count: the kernel drops them, and reads them again when they are needed. A file that
    cannot be read passes: the load reports what is wrong with it.

    Raises:
        MemoryLimitExceeded: it does not fit. The message has the figures and two ways out.
    """
    if options.get("rpc_servers"):
        return
    try:
        header = _header(path)
    except ModelLoadError:
        return
    free = free_memory(options)
    needed = header.estimate(options)
    if needed.least > free:
        raise _refused(path, header, options, needed, free, is_check=True)


def fitting_n_ctx(path: Path, options: Mapping[str, object], limit: int | None = None) -> int:
    """Return the context of n_ctx="fit": the largest that fits nine tenths of the free memory.

    Args:
        limit: bytes that the model may use at most; None without a limit.

    Returns:
        Tokens: a multiple of 256, at most the model's training context rounded up.

    Raises:
        MemoryLimitExceeded: no context fits.
        OptionError: RPC servers hold a part of the model, whose free memory is unknown, or GPUs hold some of the
            layers only, or do not report their memory.
        ModelLoadError: the file is missing, or is not GGUF.
    """
    if options.get("rpc_servers"):
        raise OptionError('n_ctx="fit" with rpc_servers, whose free memory is unknown; pass a number of tokens')
    header = _header(path)
    return _checked_fit(path, header, options, _room(header, options), limit)


def largest_n_ctx(header: ModelHeader, options: Mapping[str, object], limit: int, *, is_check: bool = False) -> int:
    """Return the largest context, in tokens, with which a model needs at most `limit` bytes; 0 if none does.

    Args:
        is_check: compare what must be free, as `check_fits` does.
    """
    most = -(-min(header.n_ctx_train or _LARGEST_N_CTX, _LARGEST_N_CTX) // _STEP)
    low, high = 0, most  # in steps: `low` fits, and all above `high` do not
    while low < high:
        middle = (low + high + 1) // 2
        needed = header.estimate({**options, "n_ctx": middle * _STEP})
        if (needed.least if is_check else needed.total) <= limit:
            low = middle
        else:
            high = middle - 1
    return low * _STEP


def describe_estimate(needed: MemoryEstimate) -> str:
    """Return the figures of an estimate for a message."""
    return (
        f"{format_size(needed.total)} (weights {format_size(needed.weights)}, context of {needed.n_ctx} tokens "
        f"{format_size(needed.kv + needed.state)}, computing {format_size(needed.compute)})"
    )


def _header(path: Path) -> ModelHeader:
    # Imported here: lists and names work without a built libllama.
    from erllama.engine.backends.memory_estimate import ModelHeader

    return ModelHeader(path)


def _checked_fit(
    path: Path, header: ModelHeader, options: Mapping[str, object], room: int | None, limit: int | None = None
) -> int:
    if room is None:
        raise OptionError(
            'n_ctx="fit" with a part of the layers on GPUs, or with GPUs that do not report their memory, so that '
            "what fits is unknown; pass a number of tokens"
        )
    usable = int(USABLE * room) if limit is None else min(int(USABLE * room), limit)
    found = largest_n_ctx(header, options, usable)
    if not found:
        smallest = {**options, "n_ctx": _STEP}
        raise _refused(path, header, smallest, header.estimate(smallest), usable, is_check=False)
    return found


def _usable_types(header: ModelHeader, options: Mapping[str, object]) -> list[str]:
    """Return the types of KV that a model can use: quantized ones need flash attention and whole blocks."""
    if options.get("flash_attn") is False or not header.takes_quantized_kv:
        return [KV_TYPES[0]]
    return list(KV_TYPES)


def _with_type(options: Mapping[str, object], kind: str, asked: str) -> dict[str, object]:
    return dict(options) if kind == asked else {**options, "kv_type_k": kind, "kv_type_v": kind}


def _refused(
    path: Path,
    header: ModelHeader,
    options: Mapping[str, object],
    needed: MemoryEstimate,
    free: int,
    *,
    is_check: bool,
) -> MemoryLimitExceeded:
    """Return the error for a model that does not fit, with ways out that do."""
    from erllama.engine.backends.memory_estimate import KV_BYTES

    ways = []
    limit = int(USABLE * free)
    if smaller := largest_n_ctx(header, options, limit, is_check=is_check):
        ways.append(f"n_ctx={smaller}, which fits")
    asked = str(options.get("kv_type_k", "f16"))
    for kind in _usable_types(header, options):
        if KV_BYTES[kind] < KV_BYTES.get(asked, 4.0) and needed.kv:
            at_most = largest_n_ctx(header, _with_type(options, kind, asked), limit, is_check=is_check)
            if at_most > smaller:
                n_ctx = min(at_most, needed.n_ctx)
                ways.append(f'kv_type_k="{kind}" and kv_type_v="{kind}" with n_ctx={n_ctx}')
                break
    if not ways:
        ways.append("a smaller model, or one with a smaller quantization")
    ways.append("free memory by ending other programs")
    n_bytes = needed.least if is_check else needed.total
    must_be_free = f", of which {format_size(n_bytes)} must be free" if n_bytes < needed.total else ""
    skip = "check_memory=False loads it without this check" if is_check else "Or pass a number of tokens for n_ctx"
    message = (
        f"{path.name} needs about {describe_estimate(needed)}{must_be_free}, and {format_size(free)} are free; use "
        f"{', or '.join(ways)}. {skip}"
    )
    return MemoryLimitExceeded(message, n_bytes, free)


def checked_n_ctx(n_ctx: object) -> int | None:
    """Return a number of tokens as an option of `load_model`; None for "fit".

    Raises:
        OptionError: it is another text.
    """
    if isinstance(n_ctx, str):
        if n_ctx != FIT:
            raise OptionError(f'n_ctx={shown(n_ctx)}; pass a number of tokens, "fit", or None')
        return None
    return cast("int | None", n_ctx)  # LlamaOptions checks it
