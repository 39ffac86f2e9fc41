"""Checks of `erllama doctor`: libllama, its devices, optional packages, and a run of the demo model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import erllama
from erllama._runtime.processes import erllama_command
from erllama.cache.sizes import format_size
from erllama.cli.doctor.findings import Finding

# Optional packages: the extra that installs each, and the feature that needs it.
_OPTIONAL_PACKAGES = {
    "gguf": ("models", "the generator of test models"),
    "prometheus_client": ("metrics", "erllama.metrics"),
    "pynvml": ("nvidia", 'pressure="nvidia"'),
    "hypothesis": ("testing", "the test harness for custom backends and tiers"),
}
_WORKER_TIMEOUT = 120  # seconds


def check_library() -> Iterator[Finding]:
    """Check libllama and list the devices that it finds."""
    try:
        from erllama.engine.backends.llama_library import llama_ffi
    except erllama.LibraryNotBuilt as error:
        yield Finding("libllama", "error", "not built", str(error))
        return
    build = llama_ffi.build_info()
    rpc = ", with RPC" if llama_ffi.rpc_server_program() else ""
    yield Finding("libllama", "ok", f"{build['source']}, for {build['backend']}{rpc}")
    try:
        devices = erllama.devices()
        features = llama_ffi.system_info()
    except (erllama.BackendError, llama_ffi.LlamaError) as error:
        yield Finding(
            "devices", "error", str(error), "reinstall erllama on this machine: pip install --force-reinstall"
        )
        return
    for device in devices:
        memory = (
            f", {format_size(device.free_bytes)} of {format_size(device.total_bytes)} free"
            if device.total_bytes
            else ""
        )
        yield Finding(f"device {device.name}", "ok", f"{device.kind}, {device.description}{memory}")
    yield Finding("processor features", "ok", _feature_names(features))
    if not any(device.kind in ("gpu", "igpu") for device in devices):
        yield from _unused_gpus(build["backend"])
    if missing := llama_ffi.missing_gpu():
        text = f"libllama was built for {missing}, but finds no GPU; the CPU computes"
        yield Finding("GPU", "warning", text, "install the GPU's driver, or make the GPU visible to this process")


def _feature_names(system_info: str) -> str:
    """Return the names of the active features in a text such as "CPU : AVX = 1 | AVX2 = 1 |"."""
    active = [part for part in system_info.split("|") if part.strip().endswith("= 1")]
    return ", ".join(part.split("=")[0].split(":")[-1].strip() for part in active) or "none"


def _unused_gpus(backend: str) -> Iterator[Finding]:
    present = {
        "cuda": Path("/dev/nvidiactl").exists() and "an NVIDIA GPU",
        "hip": Path("/dev/kfd").exists() and "an AMD GPU",
        "metal": sys.platform == "darwin" and "a GPU for Metal",
    }
    for wanted, gpu in present.items():
        if gpu:
            text = f"this machine has {gpu}, but libllama was built for {backend} and does not use it"
            fix = f"ERLLAMA_BACKEND={wanted} pip install --force-reinstall erllama, or check its driver"
            yield Finding("GPU", "warning", text, fix)


def check_packages() -> Iterator[Finding]:
    """List the optional packages, and the extras that install them."""
    for name, (extra, feature) in _OPTIONAL_PACKAGES.items():
        if importlib.util.find_spec(name) is not None:
            yield Finding(f"package {name}", "ok", "installed")
        else:
            text = f"not installed; needed for {feature}"
            yield Finding(f"package {name}", "ok", text, f"pip install 'erllama[{extra}]'")


def self_check() -> Iterator[Finding]:
    """Check, in a separate process, that the demo model runs and restores its prompt from disk."""
    with tempfile.TemporaryDirectory(prefix="erllama-doctor-") as directory:
        command = erllama_command("doctor-worker", directory)
        try:
            finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_WORKER_TIMEOUT)
        except subprocess.TimeoutExpired:
            yield Finding(
                "self-check", "error", f"no reply within {_WORKER_TIMEOUT} s", "erllama --debug doctor-worker ."
            )
            return
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        if finished.returncode < 0:
            reason = f"killed by signal {-finished.returncode}"
        else:
            reason = lines[-1].removeprefix("erllama: ") if lines else f"exit status {finished.returncode}"
        fix = "build erllama on this machine: pip install --force-reinstall --no-cache-dir erllama"
        yield Finding("self-check", "error", reason, fix)
        return
    result = json.loads(finished.stdout)
    if result["same"] and result["kind"] == "exact":
        yield Finding("self-check", "ok", f"{result['model']}: the same reply with the prompt restored from disk")
    else:
        text = f"{result['model']}: a {result['kind']} hit, {'the same' if result['same'] else 'a different'} reply"
        yield Finding("self-check", "error", text, "report a bug, with the output of: erllama doctor --json")


def run_self_check(directory: Path) -> dict[str, object]:
    """Complete a prompt twice, the second time from disk. The worker process of `self_check` calls this."""
    model, replies = erllama.demo_model(), []
    for _ in range(2):
        with (
            erllama.Cache(ram=0, disk=directory / "cache", watch=False) as cache,
            erllama.load_model(model, cache=cache, n_ctx=512, n_threads=1) as loaded,
        ):
            replies.append(loaded.complete("The lamp is lit at dusk, " * 5, max_tokens=8, temperature=0.0))
    return {"model": model.name, "same": replies[0].tokens == replies[1].tokens, "kind": replies[1].cache.kind}
