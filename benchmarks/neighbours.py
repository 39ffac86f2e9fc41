"""Scenario of busy neighbours: decode and prefill beside processes that never wait, against an idle machine.

Each measurement is a separate process, which loads the model: a process that has already competed for the cores has
adapted. The same is measured of llama-bench, with a limit of time, because its threads spin while they wait.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

from benchmarks.engines import SHORT_PROMPT, Ours, Prompts, llama_bench_command
from benchmarks.measure import Figure, Findings, Setup, Target, in_turn, n_cores
from benchmarks.processes import answer, measure_in_process

WARM_UP_SECONDS = 0.5  # the kernel has then spread the processes over the cores
MEASURE_SECONDS = 4.0  # a reply is stopped then
PEER_SECONDS = 60.0  # llama-bench is stopped then


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Run processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(WARM_UP_SECONDS if n else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def neighbours(setup: Setup) -> Findings:
    """Compare the speed beside 1, as many, and twice as many busy processes as cores with that when idle."""
    cores = n_cores()
    findings = Findings()
    for n_busy in sorted({1, cores, 2 * cores}):
        bound = 0.6 if n_busy < cores else 0.2 if n_busy == cores else 0.1
        for what, sizes in (("decode", (SHORT_PROMPT, setup.of(128, 16))), ("prefill", (setup.of(1000, 64), 0))):
            ours = partial(_ours, setup, *sizes)
            beside, idle = in_turn(partial(ours, n_busy), partial(ours, 0), setup.runs)
            findings.figures.append(
                Figure(
                    f"neighbours-{n_busy}-{what}",
                    f"{what} beside {n_busy} busy {'processes' if n_busy > 1 else 'process'} on {cores} cores",
                    "the same on an idle machine",
                    "tokens/s",
                    beside,
                    idle,
                    Target(">=", bound),
                    notes=("the default number of threads; each value is of a new process",),
                )
            )
        speeds = in_turn(
            partial(_ours, setup, SHORT_PROMPT, setup.of(128, 16), n_busy),
            partial(_theirs, setup, n_busy),
            setup.runs,
        )
        findings.figures.append(
            Figure(
                f"neighbours-{n_busy}-peer",
                f"decode beside {n_busy} busy {'processes' if n_busy > 1 else 'process'} on {cores} cores",
                "llama-bench",
                "tokens/s",
                *speeds,
                notes=(
                    f"llama-bench is stopped after {PEER_SECONDS:g} s, and then counts as if it had just ended",
                ),
            )
        )
    return findings


def _ours(setup: Setup, n_prompt: int, n_reply: int, n_busy: int) -> float:
    return float(measure_in_process("neighbours", setup, n_prompt, n_reply, n_busy))


def _theirs(setup: Setup, n_busy: int) -> float:
    """Return the tokens per second of llama-bench for a few tokens."""
    n = setup.of(32, 8)
    command = llama_bench_command(setup, "-p", "0", "-n", str(n), repeat=1)
    with busy_processes(n_busy):
        try:
            finished = subprocess.run(command, capture_output=True, check=True, timeout=PEER_SECONDS)
        except subprocess.TimeoutExpired:
            return n / PEER_SECONDS
    (row,) = json.loads(finished.stdout)
    return statistics.median(float(speed) for speed in row["samples_ts"])


def _measure(setup: Setup, n_prompt: int, n_reply: int, n_busy: int) -> float:
    """Return tokens per second: of prefill if `n_reply` is 0, of decoding otherwise."""
    prompts = Prompts()
    with Ours(setup, n_prompt + n_reply + 256, n_threads=None) as ours:
        ours.model.complete(prompts.of(SHORT_PROMPT), max_tokens=4, temperature=0)
        ours.model.evict()
        with busy_processes(n_busy):
            if not n_reply:
                timings = ours.model.complete(prompts.of(n_prompt), max_tokens=1, temperature=0).timings
                return timings.prefill_tokens / timings.prefill
            times: list[float] = []
            with ours.model.stream(prompts.of(n_prompt), max_tokens=n_reply, temperature=0) as stream:
                for _ in stream:
                    times.append(time.perf_counter())
                    if times[-1] - times[0] > MEASURE_SECONDS:
                        break
    return 1 / statistics.mean(after - before for before, after in pairwise(times))


SCENARIOS = {"neighbours": neighbours}

if __name__ == "__main__":
    answer(_measure)
