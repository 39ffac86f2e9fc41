"""`erllama demo`, and the worker processes that it starts."""

from __future__ import annotations

from pathlib import Path

import click

from erllama._demo import crash as crash_demonstration
from erllama._demo import demo as demonstration
from erllama.cli.loading import existing_path
from erllama.cli.options import model_or_demo

_TOKENS = click.IntRange(min=1)
_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--model", "-m", metavar="MODEL", help="Path or name of a model. Default: erllama's demo model.")
@click.option("--tokens", type=_TOKENS, default=600, metavar="N", help="Length of the system prompt, in tokens.")
@click.option("--max-tokens", "-n", type=_TOKENS, default=200, metavar="N", help="Maximum length of a reply.")
@click.option("--crash", is_flag=True, help="Kill the model's process twice during a reply, which ends the same.")
def demo(model: str | None, tokens: int, max_tokens: int, crash: bool) -> int:
    """Compute a long prompt, and restore it in a new process."""
    if crash:
        return crash_demonstration.run(existing_path(model_or_demo(model)), max_tokens)
    return demonstration.run(existing_path(model_or_demo(model)), tokens, max_tokens)


@click.command("demo-worker", hidden=True)
@click.argument("step", type=click.Choice(["cold", "warm"]))
@click.argument("model", type=_PATH)
@click.argument("directory", type=_PATH)
@click.argument("tokens", type=_TOKENS)
@click.argument("max_tokens", type=_TOKENS)
def demo_worker(step: str, model: Path, directory: Path, tokens: int, max_tokens: int) -> None:
    """Run one step of `demo`, which starts this command."""
    demonstration.work(step, model, directory, tokens, max_tokens)
