"""`erllama cache pin`, `pins` and `unpin`: prefixes that stay stored."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import click

import erllama
from erllama._runtime.printing import echo, one_line
from erllama.cache.sizes import format_size
from erllama.cli.cache.directories import directories_option, json_option, open_directories
from erllama.cli.console import format_count, print_json, print_table
from erllama.cli.loading import ModelOptions, existing_path
from erllama.cli.options import FILE, key_file_option, model_and_cache_options, parse_age, read_text


@click.command("pin")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to pin.")
@click.option("--file", "text_file", type=FILE, metavar="FILE", help="File with the text to pin.")
@click.option(
    "--messages", "messages_file", type=FILE, metavar="FILE", help="File with the messages to pin, a JSON list."
)
@click.option("--tools", "tools_file", type=FILE, metavar="FILE", help="File with the tools, a JSON list.")
@click.option("--name", metavar="NAME", help="Name of the pin. Default: a name made of the tokens.")
@click.option("--ttl", type=parse_age, metavar="AGE", help="How long it lasts, such as 1h or 7d. Default: no end.")
@click.option("--cache-salt", metavar="TEXT", help="Salt of the requests that share the prefix.")
@json_option
@model_and_cache_options
def pin_command(
    model: Path,
    prompt: str | None,
    text_file: Path | None,
    messages_file: Path | None,
    tools_file: Path | None,
    name: str | None,
    ttl: float | None,
    cache_salt: str | None,
    as_json: bool,
    loading: ModelOptions,
) -> None:
    """Compute a prefix, and keep it in the cache.

    Eviction and gc skip its blocks. Load the model with the options of the requests that use the prefix: KV is
    shared only by models with the same options.
    """
    given = [value for value in (prompt, text_file, messages_file) if value is not None]
    if len(given) != 1:
        raise click.UsageError("pass one of --prompt, --file and --messages")
    if tools_file is not None and messages_file is None:
        raise click.UsageError("--tools needs --messages")
    if loading.no_cache:
        raise click.UsageError("--no-cache keeps no prefix beyond this command; leave it out")
    prefix = read_text(text_file) if text_file is not None else prompt
    options = {"name": name, "ttl": ttl, "cache_salt": cache_salt}
    if tools_file is not None:
        options["tools"] = read_list(tools_file)  # type: ignore[assignment]
    content = prefix if messages_file is None else read_list(messages_file)
    named = replace(loading, extra={"id": model.stem, **loading.extra})  # `pins` shows the id
    with named.open_model(existing_path(model)) as loaded:
        pin = loaded.pin(content, **options)  # type: ignore[arg-type]
    if as_json:
        print_json(pin.as_plain())
    else:
        tokens = format_count(pin.n_tokens, "token")
        echo(f"pinned {one_line(pin.name)}: {tokens}, {format_size(pin.n_bytes)}, expires {_expiry(pin)}")


def read_list(path: Path) -> list[dict[str, object]]:
    """Return a JSON list of objects from a file.

    Raises:
        erllama.OptionError: the file has something else.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise erllama.OptionError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise erllama.OptionError(f"{path} must have a JSON list of objects, with at least one")
    return value


@click.command("pins")
@directories_option
@key_file_option
@json_option
def list_pins(directories: tuple[Path, ...], key_file: Path | None, as_json: bool) -> None:
    """List the pins, the oldest first. A block that several pins share counts for each of them."""
    with open_directories(directories, key_file) as opened:
        found = [(files, pin) for files in opened for pin in files.pins()]
    if as_json:
        print_json([pin.as_plain() | {"directory": str(files.root)} for files, pin in found])
        return
    print_table(
        [
            ("pin", "left"),
            ("model", "left"),
            ("tier", "left"),
            *((title, "right") for title in ("tokens", "size", "expires")),
        ],
        [
            [
                pin.name + ("" if pin.complete else " (incomplete)"),
                pin.model,
                files.tier,
                f"{pin.n_tokens:,}",
                format_size(pin.n_bytes),
                _expiry(pin),
            ]
            for files, pin in found
        ],
    )


@click.command("unpin")
@click.argument("name")
@directories_option
@key_file_option
def unpin_command(name: str, directories: tuple[Path, ...], key_file: Path | None) -> int:
    """Remove the pin NAME. Its blocks stay until they are evicted. Exit status 1 if no pin has this name."""
    with open_directories(directories, key_file) as opened:
        found = [files.unpin(name) for files in opened if not files.read_only]
    if not any(found):
        raise erllama.CacheError(f"there is no pin {name!r}; `erllama cache pins` lists the pins")
    echo(f"unpinned {one_line(name)}")
    return 0


def _expiry(pin: erllama.Pin) -> str:
    """Return when a pin expires, such as "in 59 min"; "never" if it does not."""
    if pin.expires is None:
        return "never"
    left = max(pin.expires - time.time(), 0)
    for unit, n_seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if left >= 2 * n_seconds:
            return f"in {left / n_seconds:.0f} {unit}"
    return f"in {left:.0f} s"
