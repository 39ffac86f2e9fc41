"""Many streams of a model so small that only the time around the computation counts, against llama-batched-bench.

`python -m benchmarks many-streams`. The model has 2 layers of 64 and a vocabulary of bytes. Both sides use one
thread. Each value is from a separate process, which loads the model.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.engines import N_BATCH, N_UBATCH, Ours, peers, whole_cells
from benchmarks.measure import Figure, Findings, Setup, Target, in_turn
from benchmarks.processes import answer, measure_in_process
from benchmarks.ticks import decodes
from erllama.testing.models import write_llama

N_PROMPT, N_REPLY = 16, 100
N_STREAMS = (1, 4, 16, 64)
REPEAT = 3  # measurements within one process, after a warm-up; the best counts
# Targets at the most streams: microseconds per token outside libllama. A default chain samples, too.
ALLOWED_US = {"complete": 40.0, "astream": 40.0, "complete, default chain": 80.0}
GREEDY: dict[str, object] = {"temperature": 0}

Prompt = list[int]


def ask_together(ours: Ours, prompts: list[Prompt], options: dict[str, object]) -> float:
    """Return the seconds of blocking calls, each in its own thread."""
    callers = [
        threading.Thread(target=partial(ours.model.complete, prompt, max_tokens=N_REPLY, **options))
        for prompt in prompts
    ]
    began = time.perf_counter()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return time.perf_counter() - began


def read_together(ours: Ours, prompts: list[Prompt], options: dict[str, object]) -> float:
    """Return the seconds of streams that one event loop reads."""

    async def read(prompt: Prompt) -> None:
        async for _ in ours.model.astream(prompt, max_tokens=N_REPLY, **options):  # type: ignore[arg-type]
            pass

    async def read_all() -> float:
        began = time.perf_counter()
        await asyncio.gather(*map(read, prompts))
        return time.perf_counter() - began

    return asyncio.run(read_all())


WAYS: dict[str, tuple[Callable[[Ours, list[Prompt], dict[str, object]], float], dict[str, object]]] = {
    "complete": (ask_together, GREEDY),
    "astream": (read_together, GREEDY),
    "complete, default chain": (ask_together, {"seed": 1}),
}


def measure_ours(setup: Setup, way: str, n_streams: int) -> tuple[str, float, float]:
    """Return the command, and the microseconds per token of all streams together: in all, and outside libllama."""
    run, options = WAYS[way]
    dice = np.random.default_rng(1)
    with Ours(setup, n_streams * whole_cells(N_PROMPT + N_REPLY), n_seq_max=n_streams) as ours:
        found = []
        for _ in range(1 + REPEAT):
            ours.model.evict()
            prompts = dice.integers(5, 300, (n_streams, N_PROMPT)).tolist()
            with decodes() as calls:
                seconds = run(ours, prompts, options)
            found.append((seconds, seconds - sum(call.ended - call.began for call in calls)))
        best, outside = (1e6 * min(values) / (n_streams * N_REPLY) for values in zip(*found[1:], strict=True))
        shown = "".join(f", {name}={value!r}" for name, value in options.items())
        method = "astream" if run is read_together else "complete"
        return (
            f"{ours.command}.{method}(ids, max_tokens={N_REPLY}{shown}), {n_streams} at once",
            best,
            outside,
        )


def measure_peer(setup: Setup, n_streams: int) -> tuple[str, float]:
    """Return llama-batched-bench's command, and its microseconds per token."""
    # fmt: off
    command = [
        str(peers(setup) / "bin" / "llama-batched-bench"), "-m", str(setup.model), "-fa", "on",
        "-t", "1", "-tb", "1", "-c", str(n_streams * whole_cells(N_PROMPT + N_REPLY)),
        "-b", str(N_BATCH), "-ub", str(N_UBATCH), "-ngl", str(setup.gpu_layers),
        "-npp", str(N_PROMPT), "-ntg", str(N_REPLY), "-npl", ",".join([str(n_streams)] * REPEAT),
        "--output-format", "jsonl",
    ]
    # fmt: on
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    if finished.returncode or not rows:
        raise SystemExit(f"{shlex.join(command)} failed:\n{finished.stderr[-3000:]}")
    return shlex.join(command), 1e6 * min(row["t"] for row in rows) / (n_streams * N_REPLY)


def many_streams(setup: Setup) -> Findings:
    """Compare the time per token, prompts included, of 1 to 64 streams of a tiny model."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as place:
        model = write_llama(Path(place) / "tiny.gguf", quantization="Q8_0")
        tiny = replace(setup, model=model, threads=1)
        for way in WAYS:
            for n_streams in N_STREAMS[:: setup.of(1, 3)]:
                findings.figures += compare(tiny, way, n_streams)
    return findings


def compare(setup: Setup, way: str, n_streams: int) -> list[Figure]:
    """Return the times per token, and those outside libllama."""
    commands: dict[str, str] = {}
    outside: list[float] = []

    def ours() -> float:
        commands["ours"], value, value_outside = measure_in_process("streams", setup, way, n_streams)
        outside.append(value_outside)
        return float(value)

    def theirs() -> float:
        commands["theirs"], value = measure_peer(setup, n_streams)
        return value

    pair = in_turn(ours, theirs, setup.runs)
    streams = f"{n_streams} stream{'s' if n_streams > 1 else ''} of a tiny model"
    shown = (commands["ours"], commands["theirs"])
    allowed = ALLOWED_US[way]
    return [
        Figure(
            f"many-{way}-{n_streams}",
            f"{streams}, {way}: time per token",
            f"llama-batched-bench -npl {n_streams}",
            "us",
            *pair,
            None,
            shown,
            [
                f"{N_REPLY} tokens of reply to {N_PROMPT} of prompt; each value is the best of {REPEAT}",
                "llama-batched-bench gives each stream cells of its own; ours share one pool, and start one by one",
            ],
        ),
        Figure(
            f"many-outside-{way}-{n_streams}",
            f"{streams}, {way}: time per token outside libllama",
            f"{allowed:g} us",
            "us",
            outside,
            [allowed] * len(outside),
            Target("<=", 1.0) if n_streams == max(N_STREAMS) else None,
            (commands["ours"],),
        ),
    ]


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"many-streams": many_streams}

if __name__ == "__main__":
    answer(measure_ours)
