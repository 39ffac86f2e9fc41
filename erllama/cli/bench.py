"""`erllama bench`: measures a model's speed and the time that the cache saves on this machine."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

import erllama
from erllama._runtime.printing import echo
from erllama.cache.tiers.directory import is_cache
from erllama.cli.console import print_fields, print_json, progress_bar
from erllama.cli.loading import ModelOptions, existing_path
from erllama.cli.options import DIRECTORY, model_argument, model_options, model_or_demo
from erllama.cli.reply import prompt_tokens as count_prompt_tokens
from erllama.cli.reply import tokens_per_second

_TEXT = (
    "Visitors climb the stairs to ask about the sea, the weather and the ships that pass. The lamp is lit at dusk "
    "and put out at dawn; between those hours the keeper writes down every vessel, its course and the hour. "
)
_MIN_PROMPT_TOKENS = 64


@click.command()
@model_argument
@model_options
@click.option(
    "--prompt-tokens",
    "-p",
    type=click.IntRange(min=_MIN_PROMPT_TOKENS),
    default=512,
    metavar="N",
    help="Length of each prompt, in tokens.",
)
@click.option(
    "--reply-tokens",
    "-n",
    type=click.IntRange(min=2),
    default=64,
    metavar="N",
    help="Length of each reply, in tokens.",
)
@click.option(
    "--runs",
    "-r",
    type=click.IntRange(min=1),
    default=3,
    metavar="N",
    help="Number of runs. The report shows their medians.",
)
@click.option(
    "--dir",
    "-d",
    "directory",
    type=DIRECTORY,
    help="Directory on the disk to measure. Default: the system's temporary directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with the figures of every run.")
def bench(
    model: str | None,
    loading: ModelOptions,
    prompt_tokens: int,
    reply_tokens: int,
    runs: int,
    directory: Path | None,
    as_json: bool,
) -> None:
    """Measure the speed of a model, with and without the cache.

    Measures prefill and decode, and the time to the first token without a cache, from RAM, and from disk after a
    restart. The prompts of the runs share no prefix, and one request runs at a time. The files that the benchmark
    writes are removed at its end.
    """
    path = existing_path(model_or_demo(model))
    with progress_bar("measuring") as report:
        measured = _Benchmark(path, loading, directory, prompt_tokens, reply_tokens, runs, report).measure()
    medians = {name: statistics.median(values) for name, values in measured.items()}
    if as_json:
        print_json(
            {
                "model": str(path),
                "prompt_tokens": prompt_tokens,
                "reply_tokens": reply_tokens,
                "median": medians,
                "runs": measured,
            }
        )
        return
    cold = medians["first_token_cold_seconds"]
    print_fields(
        [
            ("model", str(path)),
            ("prefill", f"{medians['prefill_tokens_per_second']:.1f} tok/s, {prompt_tokens} tokens"),
            ("decode", f"{medians['decode_tokens_per_second']:.1f} tok/s, {reply_tokens} tokens"),
            ("first token, cold", f"{cold * 1e3:.1f} ms"),
            ("first token, from RAM", _compared(cold, medians["first_token_ram_seconds"])),
            ("first token, from disk", _compared(cold, medians["first_token_disk_seconds"])),
        ]
    )
    echo(f"Medians of {runs} runs. Recently written files may be read from the system's memory, not the disk.")


def _compared(cold: float, warm: float) -> str:
    return f"{warm * 1e3:.1f} ms, {cold / warm:.1f} times as fast"


class _Benchmark:
    """One measurement of a model: `n_runs` prompts, each cold, from RAM and from disk."""

    def __init__(
        self,
        path: Path,
        loading: ModelOptions,
        parent: Path | None,
        n_prompt: int,
        n_reply: int,
        n_runs: int,
        report: Callable[[float], None],
    ) -> None:
        self._path, self._loading, self._parent = path, loading, parent
        self._n_prompt, self._n_reply, self._n_runs = n_prompt, n_reply, n_runs
        self._report = report
        self._figures: dict[str, list[float]] = {}

    def measure(self) -> dict[str, list[float]]:
        """Return the figures of every run, by name."""
        if self._parent is not None and is_cache(self._parent):
            raise erllama.CacheError(f"{self._parent} is a cache directory; pass another directory on that disk")
        with tempfile.TemporaryDirectory(prefix="erllama-bench-", dir=self._parent) as directory:
            root = Path(directory) / "cache"
            with (
                erllama.Cache(disk=root) as cache,
                self._loading.load(self._path, cache, show_progress=False) as model,
            ):
                self._check_context(model)
                for run in range(self._n_runs):
                    self._measure_cold(model, self._prompt(model, run))
                    self._report((run + 1) / self._n_runs * 0.7)
            # The same state as in a new process: RAM tier and context are empty.
            with (
                erllama.Cache(ram=0, disk=root) as cache,
                self._loading.load(self._path, cache, show_progress=False) as model,
            ):
                for run in range(self._n_runs):
                    self._measure_warm(model, self._prompt(model, run), "disk")
                    self._report(0.7 + (run + 1) / self._n_runs * 0.3)
        return self._figures

    def _check_context(self, model: erllama.Model) -> None:
        needed = self._n_prompt + self._n_reply
        if needed > model.n_ctx:
            raise erllama.OptionError(
                f"a prompt of {self._n_prompt} tokens and a reply of {self._n_reply} do not fit a context of "
                f"{model.n_ctx}; pass --n-ctx {needed}, or fewer tokens"
            )

    def _prompt(self, model: erllama.Model, run: int) -> list[int]:
        """Return tokens of a text that starts with the number of the run, so that runs share no prefix."""
        tokens = model.tokenize(f"{run} {_TEXT}", add_special=False)
        return np.resize(tokens, self._n_prompt).tolist()

    def _measure_cold(self, model: erllama.Model, prompt: list[int]) -> None:
        eog = np.flatnonzero(model._backend.vocabulary.is_eog).tolist()
        reply = model.complete(prompt, max_tokens=self._n_reply, temperature=0.0, banned_tokens=eog)
        timings = reply.timings
        self._record("prefill_tokens_per_second", tokens_per_second(timings.prefill_tokens, timings.prefill))
        self._record("decode_tokens_per_second", tokens_per_second(timings.decode_tokens, timings.decode))
        self._record("first_token_cold_seconds", timings.restore + timings.prefill)
        model.evict()  # moves the prompt from the context to RAM
        self._measure_warm(model, prompt, "ram")

    def _measure_warm(self, model: erllama.Model, prompt: list[int], tier: str) -> None:
        reply = model.complete(prompt, max_tokens=1, temperature=0.0)
        if reply.cache.tier != tier:
            raise erllama.CacheError(
                f"{reply.cache.tokens} of {count_prompt_tokens(reply)} tokens came from {reply.cache.tier} "
                f"instead of {tier}; check that the tier has room for them"
            )
        self._record(f"first_token_{tier}_seconds", reply.timings.restore + reply.timings.prefill)

    def _record(self, name: str, value: float) -> None:
        self._figures.setdefault(name, []).append(value)
