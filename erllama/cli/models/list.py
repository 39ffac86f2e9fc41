"""`erllama models`: lists the models on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import click

import erllama
from erllama._runtime.printing import echo
from erllama.cache.sizes import format_size
from erllama.cli.console import print_json, print_note, print_table
from erllama.models.description import ModelDescription, describe_model
from erllama.models.fit import free_memory
from erllama.models.local_model import LocalModel
from erllama.models.names import local_models

_COLUMNS = (
    ("name", "left"),
    ("size", "right"),
    ("weights", "left"),
    ("context", "right"),
    ("template", "left"),
    ("fits", "left"),
    ("store", "left"),
)


@click.command("models")
@click.argument("prefix", required=False)
@click.option("--broken", is_flag=True, help="List the models that cannot be loaded, with the reason.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the models that cannot be loaded.")
def models(prefix: str | None, broken: bool, as_json: bool) -> None:
    """List the models on this machine.

    With a PREFIX, those whose names begin so. The command reads the directories of Ollama, LM Studio, Hugging Face
    and llama.cpp, those of the variable ERLLAMA_MODELS, and that of `erllama pull`. "fits" is whether a model fits
    the free memory with the default options.
    """
    found = [model for model in local_models() if _begins(model, prefix)]
    free = free_memory({}) if found else 0
    described = [(model, _description(model)) for model in found]
    if as_json:
        print_json([_plain(model, description, free) for model, description in described])
        return
    unusable = [(model, about) for model, about in described if isinstance(about, str)]
    if broken:
        print_table((("name", "left"), ("store", "left"), ("problem", "left")), _problem_rows(unusable))
        return
    usable = [(model, about) for model, about in described if not isinstance(about, str)]
    if usable:
        print_table(_COLUMNS, [_row(model, about, free) for model, about in usable])
    else:
        echo("There are no models on this machine. `erllama pull smollm2` downloads a small one.")
    if unusable:
        count = "1 model" if len(unusable) == 1 else f"{len(unusable)} models"
        print_note(f"{count} cannot be loaded; `erllama models --broken` lists the reasons")


def _begins(model: LocalModel, prefix: str | None) -> bool:
    return not prefix or any(name.casefold().startswith(prefix.casefold()) for name in model.names)


def _description(model: LocalModel) -> ModelDescription | str:
    """Return what the file of a model says, or why it cannot be loaded."""
    if model.problem:
        return model.problem
    try:
        return describe_model(model.path)
    except (erllama.Error, OSError) as error:
        return str(error)


def _row(model: LocalModel, about: ModelDescription, free: int) -> tuple[str, ...]:
    return (
        model.name,
        format_size(model.n_bytes),
        about.quantization,
        f"{about.n_ctx_train:,}" if about.n_ctx_train else "",
        "yes" if about.has_chat_template else "no",
        "yes" if about.needed_bytes <= free else f"needs {format_size(about.needed_bytes)}",
        model.store,
    )


def _problem_rows(unusable: Sequence[tuple[LocalModel, object]]) -> list[tuple[str, ...]]:
    return [(model.name, model.store, str(problem)) for model, problem in unusable]


def _plain(model: LocalModel, about: ModelDescription | str, free: int) -> dict[str, object]:
    plain: dict[str, object] = {
        "name": model.name,
        "aliases": list(model.aliases),
        "store": model.store,
        "path": str(model.path),
        "bytes": model.n_bytes,
    }
    if isinstance(about, str):
        return plain | {"problem": about}
    return plain | {
        "architecture": about.architecture,
        "weights": about.quantization,
        "context": about.n_ctx_train,
        "chat_template": about.has_chat_template,
        "needed_bytes": about.needed_bytes,
        "fits": about.needed_bytes <= free,
    }
