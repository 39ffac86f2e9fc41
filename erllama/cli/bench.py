"""`erllama bench`: what a model does on this machine, and what the cache saves it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

import erllama
from erllama._runtime.printing import say
from erllama.cache.tiers.directory import is_cache
from erllama.cli.console import print_facts, print_json, progress
from erllama.cli.loading import Setup, plain_file
from erllama.cli.options import DIRECTORY, chosen_model, loading_options, model_argument
from erllama.cli.reply import n_prompt_tokens, tokens_per_second

_TEXT = (
    "Visitors climb the stairs to ask about the sea, the weather and the ships that pass. The lamp is lit at dusk "
    "and put out at dawn; between those hours the keeper writes down every vessel, its course and the hour. "
)
_AT_LEAST = 64


@click.command()
@model_argument
@loading_options
@click.option(
    "--prompt-tokens", "-p", type=click.IntRange(min=_AT_LEAST), default=512, metavar="N", help="Of a prompt."
)
@click.option("--reply-tokens", "-n", type=click.IntRange(min=2), default=64, metavar="N", help="Of a reply.")
@click.option(
    "--runs", "-r", type=click.IntRange(min=1), default=3, metavar="N", help="Of which the median is told."
)
@click.option(
    "--dir",
    "-d",
    "directory",
    type=DIRECTORY,
    help="Where the disk is that is measured; the system's for temporary files.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with every run.")
def bench(
    model: Path | None,
    setup: Setup,
    prompt_tokens: int,
    reply_tokens: int,
    runs: int,
    directory: Path | None,
    as_json: bool,
) -> None:
    """Measure a model: prefill, decode, and the first token cold, from RAM, and from disk after a restart.

    Prompts differ from their first word on, and are read alone. What is written to disk is removed.
    """
    path = plain_file(chosen_model(model))
    with progress("measuring") as tell:
        measured = _Bench(path, setup, directory, prompt_tokens, reply_tokens, runs, tell).measure()
    found = {name: statistics.median(values) for name, values in measured.items()}
    if as_json:
        print_json(
            {
                "model": str(path),
                "prompt_tokens": prompt_tokens,
                "reply_tokens": reply_tokens,
                "median": found,
                "runs": measured,
            }
        )
        return
    cold = found["first_token_cold_seconds"]
    print_facts(
        [
            ("model", str(path)),
            ("prefill", f"{found['prefill_tokens_per_second']:.1f} tok/s, {prompt_tokens} tokens"),
            ("decode", f"{found['decode_tokens_per_second']:.1f} tok/s, {reply_tokens} tokens"),
            ("first token, cold", f"{cold * 1e3:.1f} ms"),
            ("first token, from RAM", _against(cold, found["first_token_ram_seconds"])),
            ("first token, from disk", _against(cold, found["first_token_disk_seconds"])),
        ]
    )
    say(f"medians of {runs}; files just written may be read from the system's memory")


def _against(cold: float, warm: float) -> str:
    return f"{warm * 1e3:.1f} ms, {cold / warm:.1f} times as fast"


class _Bench:
    """One measurement."""

    def __init__(
        self,
        path: Path,
        setup: Setup,
        above: Path | None,
        n_prompt: int,
        n_reply: int,
        n_runs: int,
        tell: Callable[[float], None],
    ) -> None:
        self._path, self._setup, self._above = path, setup, above
        self._n_prompt, self._n_reply, self._n_runs = n_prompt, n_reply, n_runs
        self._tell = tell
        self._found: dict[str, list[float]] = {}

    def measure(self) -> dict[str, list[float]]:
        """Every run's figures, by name."""
        if self._above is not None and is_cache(self._above):
            raise erllama.CacheError(f"{self._above} is a cache; give another directory on that disk")
        with tempfile.TemporaryDirectory(prefix="erllama-bench-", dir=self._above) as directory:
            root = Path(directory) / "cache"
            with erllama.Cache(disk=root) as cache, self._setup.loaded(self._path, cache, bar=False) as model:
                self._check_room(model)
                for run in range(self._n_runs):
                    self._first(model, self._prompt(model, run))
                    self._tell((run + 1) / self._n_runs * 0.7)
            # As in the next process: nothing in RAM, nothing in the context.
            with (
                erllama.Cache(ram=0, disk=root) as cache,
                self._setup.loaded(self._path, cache, bar=False) as model,
            ):
                for run in range(self._n_runs):
                    self._warm(model, self._prompt(model, run), "disk")
                    self._tell(0.7 + (run + 1) / self._n_runs * 0.3)
        return self._found

    def _check_room(self, model: erllama.Model) -> None:
        needed = self._n_prompt + self._n_reply
        if needed > model.n_ctx:
            raise erllama.OptionError(
                f"{self._n_prompt} tokens of prompt and {self._n_reply} of reply, and a context of {model.n_ctx}; "
                f"give --n-ctx {needed}, or fewer tokens"
            )

    def _prompt(self, model: erllama.Model, run: int) -> list[int]:
        """Tokens that are text, and others from the first word on in each run."""
        tokens = model.tokenize(f"{run} {_TEXT}", add_special=False)
        return np.resize(tokens, self._n_prompt).tolist()

    def _first(self, model: erllama.Model, prompt: list[int]) -> None:
        eog = np.flatnonzero(model._backend.vocabulary.is_eog).tolist()
        reply = model.complete(prompt, max_tokens=self._n_reply, temperature=0.0, banned_tokens=eog)
        timings = reply.timings
        self._note("prefill_tokens_per_second", tokens_per_second(timings.prefill_tokens, timings.prefill))
        self._note("decode_tokens_per_second", tokens_per_second(timings.decode_tokens, timings.decode))
        self._note("first_token_cold_seconds", timings.restore + timings.prefill)
        model.evict()  # what is in the context is not in RAM
        self._warm(model, prompt, "ram")

    def _warm(self, model: erllama.Model, prompt: list[int], tier: str) -> None:
        reply = model.complete(prompt, max_tokens=1, temperature=0.0)
        if reply.cache.tier != tier:
            came = f"{reply.cache.tokens} of {n_prompt_tokens(reply)} tokens came from {reply.cache.tier}"
            raise erllama.CacheError(f"{came}, not from {tier}; is there room for them?")
        self._note(f"first_token_{tier}_seconds", reply.timings.restore + reply.timings.prefill)

    def _note(self, name: str, value: float) -> None:
        self._found.setdefault(name, []).append(value)
