"""What several commands take: the model, how it is loaded, how replies are drawn, sizes and ages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TypeVar

import click

import erllama
from erllama.cache.sizes import parse_bytes
from erllama.cli.loading import Setup

Command = TypeVar("Command", bound=Callable[..., object])

_AGES = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

# Options of load_model that say what a command does rather than how.
_NOT_TO_LOAD = {"path", "cache", "vocab_only", "on_progress"}


def byte_size(text: str) -> int:
    """Bytes of "2GiB"; as the `type` of an option."""
    try:
        return parse_bytes("size", text)
    except erllama.OptionError as error:
        raise click.BadParameter(str(error)) from None


def age(text: str) -> float:
    """Seconds of "7d", "12h", "30min" or "90s"; as the `type` of an option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if not found or found[2] not in _AGES:
        raise click.BadParameter(f"{text!r} is no age; give one such as 7d, 12h, 30min or 90s")
    return float(found[1]) * _AGES[found[2]]


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
        erllama.OptionError: it is none.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise erllama.OptionError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def model_argument(command: Command) -> Command:
    """MODEL, which defaults to the model that comes with the package."""
    return click.argument("model", required=False, type=click.Path(path_type=Path))(command)


def chosen_model(given: Path | None) -> Path:
    """The model that was named, or the one that comes with the package."""
    return erllama.demo_model() if given is None else given


def named_values(given: Iterable[str], option: str) -> dict[str, object]:
    """Options written as NAME=VALUE, their values as `value_of` reads them.

    Raises:
        click.UsageError: one has no "=".
    """
    found: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"{option} {text!r}: give NAME=VALUE, as {option} top_k=20")
        name = name.strip().replace("-", "_")
        found[name] = value_of(name, value)
    return found


def value_of(name: str, text: str) -> object:
    """An option's value: JSON where it is some, as 0.7, true, null or ["a", "b"]; else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if name == "logit_bias" and isinstance(value, dict):  # JSON has no other keys than texts
        return {int(key) if key.lstrip("-").isdecimal() else key: bias for key, bias in value.items()}
    return value


def loading_options(command: Command) -> Command:
    """How a model is loaded; the command gets `setup`, a `Setup`."""
    return _gathered(command, _LOADING, "setup", _setup)


def loading_and_caching_options(command: Command) -> Command:
    """How a model is loaded, and where its prompts are kept; the command gets `setup`, a `Setup`."""
    return _gathered(command, [*_LOADING, *_CACHING], "setup", _setup)


_LOADING = (
    click.option("--n-ctx", type=int, metavar="N", help="Tokens of the context; the model's, at most 4096."),
    click.option("--threads", type=int, metavar="N", help="Threads that compute; as many as processors."),
    click.option("--n-gpu-layers", type=int, metavar="N", help="Layers on GPUs; all of them."),
    click.option("--device", "devices", multiple=True, metavar="NAME", help="As `erllama doctor` names it."),
    click.option(
        "--load", multiple=True, metavar="NAME=VALUE", help="Any other option of load_model, as kv_type_k=q8_0."
    ),
)
_CACHING = (
    click.option(
        "--cache-dir", type=DIRECTORY, envvar="ERLLAMA_CACHE_DIR", help="Where prompts are kept; the user's."
    ),
    click.option("--no-cache", is_flag=True, help="Keep nothing beyond this process."),
    click.option("--quota", type=byte_size, metavar="SIZE", default="50GiB", help="Most bytes of that directory."),
)


def _setup(given: dict[str, object]) -> Setup:
    load = given.pop("load")
    assert isinstance(load, tuple)
    if given.get("no_cache") and given["cache_dir"] is not None:
        raise click.UsageError("--cache-dir and --no-cache contradict each other; give one of them")
    named = named_values(load, "--load")
    for name in _NOT_TO_LOAD & named.keys():
        raise click.UsageError(f"--load {name}: the command sees to that itself")
    return Setup(**given, others=named)  # type: ignore[arg-type]


def sampling_options(command: Command) -> Command:
    """How a reply is drawn; the command gets `drawing`, options of `Model.complete` by name."""
    added = [
        click.option("--max-tokens", "-n", type=int, metavar="N", help="Most tokens of a reply."),
        click.option("--temperature", "-t", type=float, metavar="X", help="0 for the most likely token; 0.8."),
        click.option("--top-k", type=int, metavar="N", help="Draw from the N most likely tokens; 40."),
        click.option("--top-p", type=float, metavar="X", help="Draw from the fewest that sum to this; 0.95."),
        click.option("--min-p", type=float, metavar="X", help="Draw from those this likely beside the best; 0.05."),
        click.option("--seed", type=int, metavar="N", help="Fixes the draws."),
        click.option("--stop", multiple=True, metavar="TEXT", help="A text at which the reply ends."),
        click.option(
            "--option",
            "-o",
            multiple=True,
            metavar="NAME=VALUE",
            help="Any other option of a request, as repeat_penalty=1.1.",
        ),
    ]
    return _gathered(command, added, "drawing", _drawing)


def _drawing(given: dict[str, object]) -> dict[str, object]:
    others = given.pop("option")
    assert isinstance(others, tuple)
    named = {name: value for name, value in given.items() if value is not None and value != ()}
    return named | named_values(others, "--option")


def _gathered(
    command: Command,
    added: Sequence[Callable[[Callable[..., object]], Callable[..., object]]],
    name: str,
    gather: Callable[[dict[str, object]], object],
) -> Command:
    """Add options to a command, which gets what `gather` makes of them, as one."""
    names: list[str] = []

    @wraps(command)
    def called(*arguments: object, **given: object) -> object:
        gathered = gather({own: given.pop(own) for own in names})
        return command(*arguments, **given, **{name: gathered})

    kept = len(getattr(called, "__click_params__", []))
    for option in reversed(added):
        option(called)
    parameters: list[click.Parameter] = called.__click_params__  # type: ignore[attr-defined]
    names += [parameter.name or "" for parameter in parameters[kept:]]
    return called  # type: ignore[return-value]
