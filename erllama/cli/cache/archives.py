"""`erllama cache export` and `import`: what is stored, in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

import click

from erllama._runtime.printing import one_line, say
from erllama.cache.admin.archive import export_blocks, import_blocks
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cli.cache.directories import directories_option, json_option, named_namespaces, the_disk_directory
from erllama.cli.console import count, note, print_json, progress, size
from erllama.cli.files import new_file


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@directories_option
@click.option("--namespace", "-n", "prefixes", multiple=True, metavar="KEY", help="Of this namespace alone.")
@json_option
def export_command(file: Path, directories: tuple[Path, ...], prefixes: tuple[str, ...], as_json: bool) -> None:
    """Write what is stored to a tar FILE; "-" is stdout. It holds people's prompts."""
    to_stdout = str(file) == "-"
    if to_stdout and as_json:
        raise click.UsageError("--json with FILE -: both would be on stdout")
    if to_stdout and sys.stdout.isatty():
        raise click.UsageError("an archive is nothing for a terminal; give a FILE, or pipe it on")
    with CacheFiles(the_disk_directory(directories)) as files, progress("exporting") as tell:
        among = named_namespaces([files], prefixes)
        if to_stdout:
            done = export_blocks(files, sys.stdout.buffer, among, tell)
        else:
            with new_file(file) as out:
                done = export_blocks(files, out, among, tell)
    for problem in done.left_out:
        note(f"{problem.place} left out: {problem.what}")
    if as_json:
        left_out = [{"name": problem.place, "what": problem.what} for problem in done.left_out]
        print_json({"file": str(file), "blocks": done.n_blocks, "bytes": done.n_bytes, "left_out": left_out})
    elif not to_stdout:
        say(f"{count(done.n_blocks, 'block')}, {size(done.n_bytes)}, in {one_line(str(file))}")


@click.command("import")
@click.argument("file", type=click.File("rb"))
@directories_option
@json_option
def import_command(file: IO[bytes], directories: tuple[Path, ...], as_json: bool) -> int:
    """Store the blocks of a tar FILE that `export` wrote; "-" is stdin.

    Every block is checked before it is stored, and any file that is none refuses the archive. Checksums find
    accidents, not forgers: import what comes from somebody who may write to the directory.
    """
    root = the_disk_directory(directories, make=True)
    with CacheFiles(root) as files, progress("importing") as tell:
        done = import_blocks(files, file, tell)
    for problem in done.refused:
        note(f"{problem.place} refused: {problem.what}")
    if as_json:
        refused = [{"name": problem.place, "what": problem.what} for problem in done.refused]
        counted = {"blocks": done.n_blocks, "bytes": done.n_bytes, "there": done.n_existing}
        print_json({"directory": str(root), **counted, "refused": refused})
    else:
        say(f"{count(done.n_blocks, 'block')} stored, {size(done.n_bytes)}; {done.n_existing:,} were there")
    return 1 if done.refused else 0
