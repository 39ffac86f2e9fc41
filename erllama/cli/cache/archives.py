"""`erllama cache export` and `erllama cache import`: stored blocks as a tar archive."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

import click

from erllama._runtime.printing import echo, one_line
from erllama.cache.admin.archive import export_blocks, import_blocks
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.sizes import format_size
from erllama.cli.cache.directories import (
    directories_option,
    json_option,
    key_of,
    matching_namespaces,
    single_directory,
)
from erllama.cli.console import format_count, print_json, print_note, progress_bar
from erllama.cli.files import new_file
from erllama.cli.options import key_file_option


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@directories_option
@key_file_option
@click.option(
    "--namespace",
    "-n",
    "prefixes",
    multiple=True,
    metavar="KEY",
    help="Export this namespace only. A prefix of its key is enough. Can be repeated.",
)
@json_option
def export_command(
    file: Path, directories: tuple[Path, ...], key_file: Path | None, prefixes: tuple[str, ...], as_json: bool
) -> None:
    """Write the stored blocks to a tar FILE; "-" is stdout.

    The archive contains the cached prompts. That of an encrypted directory is encrypted with its current key.
    """
    to_stdout = str(file) == "-"
    if to_stdout and as_json:
        raise click.UsageError("--json cannot be used with FILE -: both write to stdout")
    if to_stdout and sys.stdout.isatty():
        raise click.UsageError("cannot write an archive to a terminal; pass a FILE, or redirect stdout")
    with _open(single_directory(directories), key_file) as files, progress_bar("exporting") as report:
        namespaces = matching_namespaces([files], prefixes)
        if to_stdout:
            done = export_blocks(files, sys.stdout.buffer, namespaces, report)
        else:
            with new_file(file) as out:
                done = export_blocks(files, out, namespaces, report)
    for problem in done.left_out:
        print_note(f"left out {problem.location}: {problem.description}")
    if as_json:
        left_out = [{"name": problem.location, "description": problem.description} for problem in done.left_out]
        print_json({"file": str(file), "blocks": done.n_blocks, "bytes": done.n_bytes, "left_out": left_out})
    elif not to_stdout:
        blocks = format_count(done.n_blocks, "block")
        echo(f"{blocks}, {format_size(done.n_bytes)}, written to {one_line(str(file))}")


def _open(root: Path, key_file: Path | None) -> CacheFiles:
    return CacheFiles(root, key_file=key_of(root, key_file))


@click.command("import")
@click.argument("file", type=click.File("rb"))
@directories_option
@key_file_option
@json_option
def import_command(file: IO[bytes], directories: tuple[Path, ...], key_file: Path | None, as_json: bool) -> int:
    """Store the blocks of a tar FILE that `export` wrote; "-" is stdin.

    Checks every block before storing it. Refuses an archive that contains any other file. Checksums detect damage,
    not forgery: import archives only from people whom you allow to write to the directory. With --key-file, the
    directory is encrypted, and the archive may be.
    """
    root = single_directory(directories, create=True)
    with CacheFiles(root, key_file=key_file) as files, progress_bar("importing") as report:
        done = import_blocks(files, file, report)
    for problem in done.refused:
        print_note(f"refused {problem.location}: {problem.description}")
    if as_json:
        refused = [{"name": problem.location, "description": problem.description} for problem in done.refused]
        counted = {"blocks": done.n_blocks, "bytes": done.n_bytes, "existing": done.n_existing}
        print_json({"directory": str(root), **counted, "refused": refused})
    else:
        blocks = format_count(done.n_blocks, "block")
        echo(f"{blocks} stored, {format_size(done.n_bytes)}; {done.n_existing:,} already present")
    return 1 if done.refused else 0
