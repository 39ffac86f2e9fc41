"""`erllama demo`, and the worker processes that it runs."""

from __future__ import annotations

from pathlib import Path

import click

from erllama._demo import demo as _demo
from erllama.cli.loading import plain_file
from erllama.cli.options import chosen_model

_TOKENS = click.IntRange(min=1)
_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--model", "-m", type=_PATH, help="A GGUF file of your own.")
@click.option("--tokens", type=_TOKENS, default=600, metavar="N", help="Length of the system prompt.")
@click.option("--max-tokens", "-n", type=_TOKENS, default=200, metavar="N", help="Longest reply.")
def demo(model: Path | None, tokens: int, max_tokens: int) -> int:
    """Read a long prompt in one process, find it read in the next."""
    return _demo.run(plain_file(chosen_model(model)), tokens, max_tokens)


@click.command("demo-worker", hidden=True)
@click.argument("step", type=click.Choice(["cold", "warm"]))
@click.argument("model", type=_PATH)
@click.argument("directory", type=_PATH)
@click.argument("tokens", type=_TOKENS)
@click.argument("max_tokens", type=_TOKENS)
def demo_worker(step: str, model: Path, directory: Path, tokens: int, max_tokens: int) -> None:
    """Run by `demo`."""
    _demo.work(step, model, directory, tokens, max_tokens)
