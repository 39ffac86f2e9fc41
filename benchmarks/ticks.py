"""The time of a tick, inside libllama and outside it. `make profile` prints it by function."""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import erllama.llama_ffi.context as binding
from benchmarks.engines import SHORT_PROMPT, Ours, Prompts, whole_cells
from benchmarks.measure import AbsentError, Figure, Findings, Setup, Target, n_cores
from erllama.llama_ffi import build_info
from erllama.testing.models import SHAPE_135M, write_llama

ATTEMPTS = 5
ALLOWED_US = {1: 150.0, 8: 250.0}  # targets of the time outside libllama, by the number of streams


class Call(NamedTuple):
    """One call of libllama's decode: its times by time.perf_counter, and its number of tokens."""

    began: float
    ended: float
    n: int


@contextmanager
def decodes() -> Iterator[list[Call]]:
    """Record the calls of libllama's decode during the `with`."""
    calls: list[Call] = []
    lib = binding.lib
    now, decode = time.perf_counter, lib.erl_decode

    def timed(context: object, n: int, *arguments: object) -> int:
        began = now()
        code: int = decode(context, n, *arguments)
        calls.append(Call(began, now(), n))
        return code

    names = [name for name in dir(lib) if name.startswith(("erl_", "ERL_"))]
    # Plain attributes: a wrapper must not cost more than the function that it replaces.
    binding.lib = SimpleNamespace(**{name: getattr(lib, name) for name in names} | {"erl_decode": timed})
    try:
        yield calls
    finally:
        binding.lib = lib


def run(ours: Ours, prompts: Prompts, n_streams: int, n_tokens: int) -> None:
    """Run streams, each read by its own thread."""

    def read(prompt: list[int]) -> None:
        with ours.model.stream(prompt, max_tokens=n_tokens, temperature=0) as stream:
            for _ in stream:
                pass

    readers = [threading.Thread(target=read, args=(prompt,)) for prompt in prompts.many(n_streams, SHORT_PROMPT)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


def times(setup: Setup, n_streams: int) -> tuple[list[float], list[float]]:
    """Return the microseconds outside and inside libllama of each tick in which all streams decode."""
    n_tokens, prompts = 128, Prompts(setup)
    with Ours(setup, n_streams * whole_cells(SHORT_PROMPT + n_tokens), n_seq_max=n_streams) as ours:
        run(ours, prompts, n_streams, n_tokens)
        for _ in range(ATTEMPTS):
            with decodes() as calls:
                run(ours, prompts, n_streams, n_tokens)
            pairs = [(a, b) for a, b in pairwise(calls) if a.n == b.n == n_streams]
            if pairs:
                break
        else:  # the model is so small that one stream ends before the last one starts
            raise AbsentError(
                f"in {ATTEMPTS} attempts, no tick decoded all {n_streams} streams; try a larger model"
            )
    return [1e6 * (b.began - a.ended) for a, b in pairs], [1e6 * (b.ended - b.began) for _, b in pairs]


def outside(setup: Setup) -> Findings:
    """Measure the time outside libllama per tick."""
    findings = Findings()
    for n_streams, allowed in ALLOWED_US.items():
        try:
            found = [times(setup, n_streams) for _ in range(setup.runs)]
        except AbsentError as error:
            findings.absent.append(f"outside-{n_streams}: {error}")
            continue
        inside = statistics.median(t for _, run_inside in found for t in run_inside)
        medians = [statistics.median(run_outside) for run_outside, _ in found]
        share = statistics.median(medians) / (statistics.median(medians) + inside)
        findings.figures.append(
            Figure(
                f"outside-{n_streams}",
                f"time outside libllama per tick, {n_streams} stream{'s' if n_streams > 1 else ''}",
                f"{allowed:g} us",
                "us",
                medians,
                [allowed] * setup.runs,
                Target("<=", 1.0),
                (),
                [f"libllama's own decode takes {inside / 1e3:.2f} ms; {share:.1%} of a tick is outside it"],
            )
        )
    return findings


def profile(setup: Setup, n_streams: int) -> None:
    """Print the functions of the model thread by their time. The profiler makes all of them slower."""
    profiler = cProfile.Profile()
    prompts = Prompts(setup)
    n_tokens = setup.of(256, 32)
    with Ours(setup, n_streams * whole_cells(SHORT_PROMPT + n_tokens), n_seq_max=n_streams) as ours:
        run(ours, prompts, n_streams, n_tokens)
        scheduler = ours.model._runner._scheduler
        tick = scheduler.tick

        def profiled() -> bool:
            profiler.enable()
            try:
                return tick()
            finally:
                profiler.disable()

        scheduler.tick = profiled  # type: ignore[method-assign]
        run(ours, prompts, n_streams, n_tokens)
        del scheduler.tick
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"outside": outside}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ticks", description=__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF file. Default: a generated model of the 135m shape")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=n_cores())
    options = parser.parse_args()
    model: Path = options.model or write_llama(Path("build/135m.gguf"), SHAPE_135M, quantization="Q8_0")
    setup = Setup(model, options.threads, 1, backend=build_info()["backend"])
    beyond, inside = times(setup, options.streams)
    for name, values in (("outside libllama", beyond), ("in libllama's decode", inside)):
        ordered = sorted(values)
        print(
            f"{name}, per tick: median {statistics.median(ordered):.0f} us, "
            f"a tenth under {ordered[len(ordered) // 10]:.0f}, a tenth over {ordered[-len(ordered) // 10]:.0f}"
        )
    print(f"share outside: {sum(beyond) / (sum(beyond) + sum(inside)):.1%}\n")
    profile(setup, options.streams)


if __name__ == "__main__":
    main()
