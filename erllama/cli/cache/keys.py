"""`erllama cache new-key` and `rekey`: create a file of keys, and rotate the keys of a directory."""

from __future__ import annotations

from pathlib import Path

import click

import erllama
from erllama._runtime.printing import echo, one_line
from erllama.cache.admin.key_rotation import RotationResult, rotate_keys
from erllama.cache.blocks.key_file import create_key_file
from erllama.cache.sizes import format_size
from erllama.cache.tiers.key_state import is_encrypted
from erllama.cli.cache.directories import directories_option, json_option, resolve_directories
from erllama.cli.console import format_count, print_json, progress_bar
from erllama.cli.options import key_file_option

_RESPONSES = "responses.sqlite"


@click.command("new-key")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def new_key(file: Path) -> None:
    """Write a new secret key to a new FILE, which only you can read.

    Keep a copy in a safe place: without the key, what it encrypted is lost.
    """
    echo(f"key {create_key_file(file).ids[0]} written to {one_line(str(file))}")


@click.command("rekey")
@directories_option
@key_file_option
@json_option
def rekey(directories: tuple[Path, ...], key_file: Path | None, as_json: bool) -> None:
    """Encrypt directories with the newest key of the key file, and end the use of their old keys.

    Put the new key above the old ones in the key file that all processes use, and run this command. Afterwards,
    remove the old keys. Other processes may use the directories meanwhile. If the command is interrupted, run it
    again: it continues.
    """
    if key_file is None:
        raise click.UsageError("pass --key-file with the new key first and the keys in use below it")
    locations = resolve_directories(directories)
    # Of the user's own directories, those that are encrypted; of named ones, all.
    chosen = [location for location in locations if directories or is_encrypted(location.path)]
    if locations and not chosen:
        raise erllama.CacheKeyError("none of your cache directories is encrypted; --dir chooses another one")
    done: list[tuple[Path, RotationResult]] = []
    for location in chosen:
        with progress_bar(f"encrypting {location.path}") as report:
            result = rotate_keys(location.path, key_file, in_memory=location.in_memory, on_done=report)
        if (location.path / _RESPONSES).exists():
            _encrypt_responses(location.path, key_file)
        done.append((location.path, result))
    if as_json:
        print_json([{"directory": str(path)} | _plain(result) for path, result in done])
        return
    for path, result in done:
        n = format_count(result.encrypted.n_blocks, "block")
        damaged = f", {format_count(result.n_damaged, 'damaged block')} removed" if result.n_damaged else ""
        ended = f"; no longer used: {', '.join(result.old_key_ids)}" if result.old_key_ids else ""
        echo(
            f"{one_line(str(path))}: {n}, {format_size(result.encrypted.n_bytes)}, encrypted with key "
            f"{result.key_id}{damaged}{ended}"
        )


def _plain(result: RotationResult) -> dict[str, object]:
    return {
        "key": result.key_id,
        "old_keys": list(result.old_key_ids),
        "encrypted_blocks": result.encrypted.n_blocks,
        "encrypted_bytes": result.encrypted.n_bytes,
        "damaged_blocks": result.n_damaged,
    }


def _encrypt_responses(root: Path, key_file: Path) -> None:
    """Encrypt the responses that a server stores in a directory with the newest key."""
    from erllama.server.stored_responses import encrypt_again  # needs the extra "server"

    encrypt_again(root, key_file)
