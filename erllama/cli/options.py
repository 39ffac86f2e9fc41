"""Options that several commands share: the model, its loading, the cache, sampling, sizes and ages."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TypeVar

import click

import erllama
from erllama.cache.sizes import parse_bytes
from erllama.checks import seconds
from erllama.cli.loading import ModelOptions
from erllama.models.fit import FIT
from erllama.models.names import model_path

Command = TypeVar("Command", bound=Callable[..., object])
Option = Callable[[Callable[..., object]], Callable[..., object]]

# Options of load_model that the command sets itself.
_RESERVED = {"path", "cache", "vocab_only", "on_progress"}


def parse_size(text: str) -> int:
    """Return the bytes of "2GiB". The `type` of a click option."""
    try:
        return parse_bytes("size", text)
    except erllama.OptionError as error:
        raise click.BadParameter(str(error)) from None


def parse_age(text: str) -> float:
    """Return the seconds of "7d", "12h", "30min" or "90s". The `type` of a click option."""
    try:
        return seconds("age", text)
    except erllama.OptionError as error:
        raise click.BadParameter(str(error)) from None


def parse_n_ctx(text: str) -> int | str:
    """Return the tokens of "8192", or "fit". The `type` of a click option."""
    if text == FIT:
        return FIT
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number of tokens nor {FIT!r}") from None


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        erllama.OptionError: the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise erllama.OptionError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def model_argument(command: Command) -> Command:
    """Add the optional argument MODEL, the path or the name of a model."""
    return click.argument("model", required=False)(command)


def model_or_demo(model: str | None) -> Path:
    """Return the file of the user's model, by its path or its name; that of the demo model for None.

    Raises:
        ModelNameError: no model on this machine has the name.
    """
    return erllama.demo_model() if model is None else model_path(model)


def parse_assignments(texts: Iterable[str], option: str) -> dict[str, object]:
    """Return options written as NAME=VALUE. `parse_value` reads the values.

    Raises:
        click.UsageError: a text has no "=" or no name.
    """
    values: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"{option} {text!r}: pass NAME=VALUE, for example {option} top_k=20")
        name = name.strip().replace("-", "_")
        values[name] = parse_value(name, value)
    return values


def parse_value(name: str, text: str) -> object:
    """Return the value of an option: JSON such as 0.7, true, null or ["a", "b"]; any other text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if name == "logit_bias" and isinstance(value, dict):  # keys of JSON objects are always strings
        return {int(key) if key.lstrip("-").isdecimal() else key: bias for key, bias in value.items()}
    return value


# --- loading and caching ----------------------------------------------------------------------


def model_options(command: Command) -> Command:
    """Add the options for loading a model. The command gets `loading`, a `ModelOptions`."""
    return _add_options(command, _LOADING, "loading", _build_model_options)


def model_and_cache_options(command: Command) -> Command:
    """Add the options for loading a model and for its cache. The command gets `loading`, a `ModelOptions`."""
    return _add_options(command, [*_LOADING, *_CACHE], "loading", _build_model_options)


_LOADING = (
    click.option(
        "--n-ctx",
        type=parse_n_ctx,
        metavar="N",
        help="Context size in tokens, or fit for the largest that fits the free memory. "
        "Default: the model's, up to 4096.",
    ),
    click.option(
        "--threads", type=int, metavar="N", help="Number of threads. Default: at most the number of cores."
    ),
    click.option("--n-gpu-layers", type=int, metavar="N", help="Layers to place on GPUs. Default: all."),
    click.option(
        "--device",
        "devices",
        multiple=True,
        metavar="NAME",
        help="Device to use, by its name in `erllama doctor`. Can be repeated.",
    ),
    click.option(
        "--load",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other option of load_model, for example kv_type_k=q8_0. Can be repeated.",
    ),
)
key_file_option = click.option(
    "--key-file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="ERLLAMA_KEY_FILE",
    help="File of the keys that encrypt the cache directory, made by `erllama cache new-key`.",
)
_CACHE = (
    click.option(
        "--cache-dir",
        type=DIRECTORY,
        envvar="ERLLAMA_CACHE_DIR",
        help="Directory for cached prompts. Default: the user's cache directory.",
    ),
    key_file_option,
    click.option("--no-cache", is_flag=True, help="In-memory cache only."),
    click.option(
        "--quota",
        type=parse_size,
        metavar="SIZE",
        help="Size limit of the cache directory. "
        f"Default: {inspect.signature(erllama.Cache).parameters['disk_quota'].default}.",
    ),
    click.option(
        "--remote",
        metavar="ADDRESS",
        envvar="ERLLAMA_REMOTE",
        help="Bucket or mounted directory that machines share, such as s3://bucket/prefix.",
    ),
    click.option(
        "--remote-key-file",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="ERLLAMA_REMOTE_KEY_FILE",
        help="File of the keys that sign what is stored there.",
    ),
)


def _build_model_options(values: dict[str, object]) -> ModelOptions:
    load = values.pop("load")
    assert isinstance(load, tuple)
    if values.get("no_cache") and values["cache_dir"] is not None:
        raise click.UsageError("--cache-dir and --no-cache exclude each other; pass one of them")
    if values.get("no_cache") and values["remote"] is not None:
        raise click.UsageError("--remote and --no-cache exclude each other; pass one of them")
    extra = parse_assignments(load, "--load")
    for name in _RESERVED & extra.keys():
        raise click.UsageError(f"--load {name}: the command sets this option itself")
    return ModelOptions(**values, extra=extra)  # type: ignore[arg-type]


# --- sampling ---------------------------------------------------------------------------------


def sampling_options(command: Command) -> Command:
    """Add the options for sampling. The command gets `sampling`, options of `Model.complete` by name."""
    # Imported here: the commands that need no model need no engine.
    from erllama.engine.sampling.options import DECLARED

    defaults = {name: option.default for name, option in DECLARED.items()}
    options = [
        click.option("--max-tokens", "-n", type=int, metavar="N", help="Maximum number of tokens of a reply."),
        click.option(
            "--temperature",
            "-t",
            type=float,
            metavar="X",
            help=f"Randomness; 0 always takes the most likely token. Default: {defaults['temperature']}.",
        ),
        click.option(
            "--top-k",
            type=int,
            metavar="N",
            help=f"Sample from the N most likely tokens. Default: {defaults['top_k']}.",
        ),
        click.option(
            "--top-p",
            type=float,
            metavar="X",
            help="Sample from the smallest set of most likely tokens with this total probability. "
            f"Default: {defaults['top_p']}.",
        ),
        click.option(
            "--min-p",
            type=float,
            metavar="X",
            help=f"Minimum probability of a token, relative to the most likely one. Default: {defaults['min_p']}.",
        ),
        click.option("--seed", type=int, metavar="N", help="Seed of the random draws. Default: a random seed."),
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="End the reply before this text. Can be repeated."
        ),
        click.option(
            "--option",
            "-o",
            multiple=True,
            metavar="NAME=VALUE",
            help="Any other option of a request, for example repeat_penalty=1.1. Can be repeated.",
        ),
    ]
    return _add_options(command, options, "sampling", _build_sampling)


def _build_sampling(values: dict[str, object]) -> dict[str, object]:
    option = values.pop("option")
    assert isinstance(option, tuple)
    options = {name: value for name, value in values.items() if value is not None and value != ()}
    return options | parse_assignments(option, "--option")


def _add_options(
    command: Command, options: Sequence[Option], parameter: str, build: Callable[[dict[str, object]], object]
) -> Command:
    """Add options to a command. It gets one parameter: the object that `build` makes of their values."""
    names: list[str] = []

    @wraps(command)
    def wrapper(*arguments: object, **values: object) -> object:
        built = build({name: values.pop(name) for name in names})
        return command(*arguments, **values, **{parameter: built})

    n_before = len(getattr(wrapper, "__click_params__", []))
    for option in reversed(options):
        option(wrapper)
    parameters: list[click.Parameter] = wrapper.__click_params__  # type: ignore[attr-defined]
    names += [each.name or "" for each in parameters[n_before:]]
    return wrapper  # type: ignore[return-value]
