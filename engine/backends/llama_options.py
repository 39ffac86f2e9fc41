"""The options for loading a model file and creating its context, and their checks.

`LlamaOptions` raises `OptionError` for values that have a wrong type, are out of range or contradict each other,
before the load. `check_against_file` does so for values that contradict the file's metadata. Options that libllama
would silently ignore are errors, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from erllama.checks import boolean, choice, integer, real
from erllama.engine.backends.llama_library import MAX_SEQUENCES, add_rpc_servers, devices, llama_ffi
from erllama.errors import OptionError

MetadataValue = int | float | bool | str

KV_TYPES = ("f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
SPLIT_MODES = ("none", "layer", "row")
ROPE_SCALINGS = ("none", "linear", "yarn")
MAX_N_CTX = 2**30
_UNQUANTIZED = ("f16", "f32", "bf16")
_YARN_FACTORS = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
_YARN = (*_YARN_FACTORS, "yarn_orig_ctx")
_FLOAT32_MAX = 3.4e38
_OVERRIDE_BYTES = 127  # libllama stores keys and texts in 128 bytes, including a final 0
_OVERRIDE_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """The options of a load and of its context. None selects libllama's or the model's default.

    Attributes:
        n_ctx: cells, in tokens, rounded up to a multiple of 256; None for the model's training context, at most
            4096.
        n_batch: maximum number of tokens in one decode.
        n_ubatch: tokens computed at once, and the length of a prefill slice.
        n_sequences: sequences that the context can hold.
        n_spare_sequences: additional sequences, for models whose sequences take no memory of their own.
        n_threads: threads for decoding; None for at most the number of physical cores that this process may use.
        n_threads_batch: threads for prefill; None for the same as n_threads.
        n_gpu_layers: layers on GPUs; -1, or more than the model has, for all.
        devices: names of the devices that compute beside the CPU; None for all GPUs.
        rpc_servers: RPC servers, as "host:port", whose devices compute, too; with `devices`, only the named ones.
        split_mode: how devices share a model, one of SPLIT_MODES.
        main_gpu: with "none", the device that has the whole model, counted from 0; None for the first.
        tensor_split: the share of each device, in any unit; None to split by free memory.
        flash_attn: True, False, or "auto" for libllama's choice.
        kv_type_k, kv_type_v: type of the K and V cells, one of KV_TYPES.
        rope_scaling: one of ROPE_SCALINGS.
        rope_freq_base, rope_freq_scale: parameters of RoPE.
        yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow, yarn_orig_ctx: parameters of YaRN.
        swa_full: allocate cells for the whole context in layers with a sliding window.
        overrides: metadata that replaces the file's, by key.
        mmap: map the file instead of reading it.
        mlock: lock the weights in memory.
    """

    n_ctx: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_sequences: int = 1
    n_spare_sequences: int = 0
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int = -1
    devices: Sequence[str] | None = None
    rpc_servers: Sequence[str] | None = None
    split_mode: str = "layer"
    main_gpu: int | None = None
    tensor_split: Sequence[float] | None = None
    flash_attn: bool | str = "auto"
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    rope_scaling: str | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_orig_ctx: int | None = None
    swa_full: bool = False
    overrides: Mapping[str, MetadataValue] | None = None
    mmap: bool = True
    mlock: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_cells()
        self._check_rope()
        self._put("overrides", _check_overrides(self.overrides))
        for name in ("mmap", "mlock"):
            boolean(name, getattr(self, name))
        self._check_devices()

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_integer(self, name: str, minimum: int, maximum: int) -> None:
        if getattr(self, name) is not None:
            self._put(name, integer(name, getattr(self, name), minimum, maximum))

    def _check_real(self, name: str, minimum: float) -> None:
        if getattr(self, name) is not None:
            self._put(name, real(name, getattr(self, name), minimum, _FLOAT32_MAX))

    def _check_sizes(self) -> None:
        for name in ("n_ctx", "n_batch", "n_ubatch"):
            self._check_integer(name, 1, MAX_N_CTX)
        self._check_integer("n_sequences", 1, MAX_SEQUENCES)
        self._check_integer("n_spare_sequences", 0, MAX_SEQUENCES - self.n_sequences)
        for name in ("n_threads", "n_threads_batch"):
            self._check_integer(name, 1, 512)

    def _check_cells(self) -> None:
        if not isinstance(self.flash_attn, bool) and self.flash_attn != "auto":
            raise OptionError(f"flash_attn={self.flash_attn!r}; use True, False or 'auto'")
        for name in ("kv_type_k", "kv_type_v"):
            choice(name, getattr(self, name), KV_TYPES)
        boolean("swa_full", self.swa_full)
        if self.kv_type_v not in _UNQUANTIZED and self.flash_attn is False:
            raise OptionError(
                f"kv_type_v={self.kv_type_v!r} needs flash attention; leave flash_attn at 'auto', or use 'f16'"
            )

    def _check_rope(self) -> None:
        if self.rope_scaling is not None:
            choice("rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        for name in ("rope_freq_base", "rope_freq_scale", "yarn_beta_fast", "yarn_beta_slow"):
            self._check_real(name, 1e-6)
        for name in ("yarn_ext_factor", "yarn_attn_factor"):
            self._check_real(name, 0.0)
        self._check_integer("yarn_orig_ctx", 1, 2**31 - 1)
        if self.rope_scaling == "none" and self.rope_freq_scale is not None:
            raise OptionError(
                f"rope_freq_scale={self.rope_freq_scale} with rope_scaling='none', which disables scaling; "
                "leave out one of them"
            )
        if self.rope_scaling in ("none", "linear"):
            self._refuse_yarn(f"rope_scaling={self.rope_scaling!r}")
        if self.yarn_attn_factor is not None and self.yarn_ext_factor != 0:
            raise OptionError(
                f"yarn_attn_factor={self.yarn_attn_factor} without yarn_ext_factor=0: libllama computes the factor "
                "itself when it extrapolates; add yarn_ext_factor=0, or leave it out"
            )
        fast, slow = self.yarn_beta_fast, self.yarn_beta_slow
        if fast is not None and slow is not None and fast <= slow:
            raise OptionError(f"yarn_beta_fast={fast} must be more than yarn_beta_slow={slow}")

    def _refuse_yarn(self, reason: str) -> None:
        for name in _YARN:
            if getattr(self, name) is not None:
                raise OptionError(
                    f"{name}={getattr(self, name)} has no effect with {reason}; "
                    "use rope_scaling='yarn', or leave it out"
                )

    def check_against_file(self, metadata: Mapping[str, object]) -> None:
        """Check the options against a file's metadata, with overrides applied.

        Raises:
            OptionError: YaRN options for a model with another scaling.
        """
        if self.rope_scaling is None:
            own = metadata.get(f"{metadata.get('general.architecture')}.rope.scaling.type", "linear")
            if own != "yarn":
                self._refuse_yarn(f"this model's own scaling, {own!r}")

    # --- devices

    def _check_devices(self) -> None:
        self._check_integer("n_gpu_layers", -1, 2**31 - 1)
        choice("split_mode", self.split_mode, SPLIT_MODES)
        if self.main_gpu is not None:
            self._put("main_gpu", integer("main_gpu", self.main_gpu, 0))
            if self.split_mode != "none":
                raise OptionError(
                    f"main_gpu={self.main_gpu} with split_mode={self.split_mode!r}, which uses every device; "
                    "use split_mode='none', or name the device in devices"
                )
        if self.tensor_split is not None:
            self._put("tensor_split", _check_shares(self.tensor_split))
            if self.split_mode == "none":
                raise OptionError(
                    "tensor_split with split_mode='none', which puts all on one device; leave out one of them"
                )
        if self.rpc_servers is not None:
            self._put("rpc_servers", add_rpc_servers(self.rpc_servers))
        if self.devices is not None:
            names = self.devices
            if isinstance(names, str | bytes) or not isinstance(names, Sequence):
                raise OptionError(f"devices={names!r}; pass a list of names from erllama.devices()")
            self._put("devices", tuple(names))
        if self.devices is not None or self.main_gpu is not None or self.tensor_split is not None:
            self.offload_devices()

    def offload_devices(self) -> list[tuple[int, llama_ffi.Device]]:
        """Return the devices that receive layers, with their numbers.

        Raises:
            OptionError: `devices`, `main_gpu` or `tensor_split` do not fit the existing devices.
        """
        found = _named_devices(self.devices) if self.devices is not None else _gpus(self.rpc_servers or ())
        named = ", ".join(device.name for _, device in found) or "none"
        if self.devices is not None and not found and self.n_gpu_layers > 0:
            raise OptionError(
                f"n_gpu_layers={self.n_gpu_layers} with devices={list(self.devices)!r}, which has no GPU; "
                "leave out one of them"
            )
        if self.main_gpu is not None and self.main_gpu >= len(found):
            raise OptionError(f"main_gpu={self.main_gpu}, but there are {len(found)} devices: {named}")
        if self.tensor_split is not None and len(self.tensor_split) != len(found):
            raise OptionError(
                f"tensor_split has {len(self.tensor_split)} shares, but there are {len(found)} devices: "
                f"{named}; pass one share per device"
            )
        return found

    def computing_devices(self) -> list[llama_ffi.Device]:
        """Return the devices of `offload_devices` that compute; [] if all layers stay on the CPU."""
        found = [device for _, device in self.offload_devices()] if self.n_gpu_layers else []
        at = self.main_gpu or 0
        return found[at : at + 1] if self.split_mode == "none" else found


def _gpus(servers: Sequence[str]) -> list[tuple[int, llama_ffi.Device]]:
    """Return libllama's default devices: the devices of `servers`, then every GPU once.

    Without GPUs of this machine, its integrated GPUs take their place.
    """
    seen: set[str] = set()
    gpus, integrated, remote = [], [], []
    for number, device in enumerate(devices()):
        if device.server:
            remote += [(number, device)] if device.server in servers else []
        elif device.kind == "gpu" and not (
            device.id and device.id in seen
        ):  # two drivers may offer the same device, with the same id
            seen.add(device.id)
            gpus.append((number, device))
        elif device.kind == "igpu":
            integrated.append((number, device))
    # Remote ones first, as in llama.cpp: the last layers are then on this machine, and so is the output.
    return remote + (gpus or integrated)


def _named_devices(names: Sequence[str]) -> list[tuple[int, llama_ffi.Device]]:
    known = {device.name: (number, device) for number, device in enumerate(devices())}
    found = []
    for name in names:
        number, device = known[choice("devices", name, known)]
        if device.kind == "accel":
            raise OptionError(
                f"devices: {name!r} accelerates the CPU automatically and takes no layers; leave it out"
            )
        if (number, device) in found:
            raise OptionError(f"devices: {name!r} is listed twice")
        if device.kind != "cpu":
            found.append((number, device))
    return found


def _check_shares(value: object) -> tuple[float, ...]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise OptionError(f"tensor_split={value!r}; pass a list of numbers, one per device")
    shares = tuple(real(f"tensor_split[{i}]", share, 0.0, _FLOAT32_MAX) for i, share in enumerate(value))
    if not any(shares):
        raise OptionError(f"tensor_split={list(shares)} has no share above 0; pass at least one")
    return shares


def _check_overrides(value: object) -> Mapping[str, MetadataValue] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise OptionError(f"overrides={value!r}; pass a mapping of metadata keys to values")
    return MappingProxyType({_check_key(key): _check_value(key, value[key]) for key in sorted(value, key=str)})


def _check_key(key: object) -> str:
    if not isinstance(key, str) or not _OVERRIDE_KEY.fullmatch(key):
        raise OptionError(
            f"overrides: {key!r} is not a metadata key; use its full name, such as 'llama.rope.freq_base'"
        )
    if len(key) > _OVERRIDE_BYTES:
        raise OptionError(f"overrides: a key of {len(key)} bytes; libllama takes at most {_OVERRIDE_BYTES}")
    return key


def _check_value(key: str, value: object) -> MetadataValue:
    name = f"overrides[{key!r}]"
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        n_bytes = len(value.encode("utf-8", "surrogatepass"))
        if n_bytes > _OVERRIDE_BYTES or "\0" in value or n_bytes != len(value.encode("utf-8", "ignore")):
            raise OptionError(
                f"{name} is not a text for libllama; use at most {_OVERRIDE_BYTES} bytes of UTF-8 without 0"
            )
        return value
    if hasattr(value, "__index__"):
        return integer(name, value, 0, 2**32 - 1)
    if hasattr(value, "__float__"):
        return real(name, value, -_FLOAT32_MAX, _FLOAT32_MAX)
    raise OptionError(f"{name}={value!r}; use an int, a float, a bool or a string")
