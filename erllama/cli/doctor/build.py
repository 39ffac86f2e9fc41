"""What `erllama doctor` says of the build: libllama, what it computes on, and whether a model runs."""

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
from erllama.cli.console import count, size
from erllama.cli.doctor.findings import Finding

_OF_PACKAGES = {
    "gguf": ("models", "making test models"),
    "prometheus_client": ("metrics", "metrics"),
    "pynvml": ("nvidia", 'pressure="nvidia"'),
    "hypothesis": ("testing", "the harness for backends and tiers of your own"),
}
_WORKER_SECONDS = 120


def library() -> Iterator[Finding]:
    """Of libllama and the devices that it sees."""
    try:
        from erllama.engine.backends.llama_library import llama_ffi
    except erllama.LibraryNotBuilt as error:
        yield Finding("libllama", "wrong", "not built", str(error))
        return
    build = llama_ffi.build_info()
    yield Finding("libllama", "ok", f"{build['source']}, for {build['backend']}")
    try:
        seen = erllama.devices()
        features = llama_ffi.system_info()
    except (erllama.BackendError, llama_ffi.LlamaError) as error:
        yield Finding(
            "devices", "wrong", str(error), "install erllama anew on this machine: pip install --force-reinstall"
        )
        return
    for device in seen:
        memory = f", {size(device.free_bytes)} of {size(device.total_bytes)} free" if device.total_bytes else ""
        yield Finding(f"device {device.name}", "ok", f"{device.kind}, {device.description}{memory}")
    yield Finding("processor features", "ok", _features(features))
    if not any(device.kind in ("gpu", "igpu") for device in seen):
        yield from _unused_gpus(build["backend"])


def _features(told: str) -> str:
    """What libllama prints, as "CPU : AVX = 1 | AVX2 = 1 |", without the words for what is there."""
    named = [part.split("=")[0].split(":")[-1].strip() for part in told.split("|") if part.strip().endswith("= 1")]
    return ", ".join(named) or "none"


def _unused_gpus(backend: str) -> Iterator[Finding]:
    there = {
        "cuda": Path("/dev/nvidiactl").exists() and "an NVIDIA GPU",
        "hip": Path("/dev/kfd").exists() and "an AMD GPU",
        "metal": sys.platform == "darwin" and "a GPU for Metal",
    }
    for wanted, gpu in there.items():
        if gpu:
            what = f"this machine has {gpu}, and libllama, built for {backend}, does not use it"
            mend = f"ERLLAMA_BACKEND={wanted} pip install --force-reinstall erllama; or its driver is not working"
            yield Finding("GPU", "note", what, mend)


def packages() -> Iterator[Finding]:
    """Of what is optional."""
    for name, (extra, purpose) in _OF_PACKAGES.items():
        there = importlib.util.find_spec(name) is not None
        text = "there" if there else f"not there; {purpose} needs it"
        yield Finding(f"package {name}", "ok", text, "" if there else f"pip install 'erllama[{extra}]'")


def self_check() -> Iterator[Finding]:
    """Whether the demo model runs, in a process of its own, and finds its prompt again on disk."""
    with tempfile.TemporaryDirectory(prefix="erllama-doctor-") as directory:
        command = erllama_command("doctor-worker", directory)
        try:
            finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_WORKER_SECONDS)
        except subprocess.TimeoutExpired:
            yield Finding(
                "self-check", "wrong", f"no reply within {_WORKER_SECONDS} s", "erllama --debug doctor-worker ."
            )
            return
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        why = f"ended by signal {-finished.returncode}" if finished.returncode < 0 else (lines or ["it failed"])[-1]
        mend = "build erllama on this machine: pip install --force-reinstall --no-cache-dir erllama"
        yield Finding("self-check", "wrong", why.removeprefix("erllama: "), mend)
        return
    told = json.loads(finished.stdout)
    if told["same"] and told["kind"] == "exact":
        yield Finding("self-check", "ok", f"{told['model']}: the same reply from a prompt that was read once")
    else:
        text = f"{told['model']}: a {told['kind']} hit, {'the same' if told['same'] else 'another'} reply"
        yield Finding("self-check", "wrong", text, "report this, with the output of: erllama doctor --json")


def run_self_check(directory: Path) -> dict[str, object]:
    """What the process of `self_check` does: complete a prompt twice, through the disk."""
    model, replies = erllama.demo_model(), []
    for _ in range(2):
        with (
            erllama.Cache(ram=0, disk=directory / "cache", watch=False) as cache,
            erllama.load_model(model, cache=cache, n_ctx=512, n_threads=1) as loaded,
        ):
            replies.append(loaded.complete("The lamp is lit at dusk, " * 5, max_tokens=8, temperature=0.0))
    again = replies[1].cache
    return {"model": model.name, "same": replies[0].tokens == replies[1].tokens, "kind": again.kind}


def counted(findings: list[Finding]) -> str:
    """The last line: how many things are wrong."""
    n_wrong = sum(finding.state == "wrong" for finding in findings)
    return f"{count(n_wrong, 'thing')} wrong" if n_wrong else "all is well"
