"""`erllama cache verify`, `gc`, `evict` and `wipe`: check stored blocks, clean up, and remove blocks."""

from __future__ import annotations

import time
from pathlib import Path

import click

from erllama._runtime.printing import echo, one_line
from erllama.cache.admin.maintenance import BlockTotals
from erllama.cache.admin.wipe import wipe
from erllama.cache.sizes import format_size
from erllama.cache.tiers.directory import is_cache
from erllama.cache.tiers.key_state import is_encrypted
from erllama.cli.cache.directories import (
    directories_option,
    json_option,
    matching_namespaces,
    open_directories,
    resolve_directories,
)
from erllama.cli.console import format_count, print_json, progress_bar
from erllama.cli.options import key_file_option, parse_age, parse_size


@click.command()
@directories_option
@key_file_option
@click.option("--repair", is_flag=True, help="Move damaged files to damaged/, and make the index match the files.")
@json_option
def verify(directories: tuple[Path, ...], key_file: Path | None, repair: bool, as_json: bool) -> int:
    """Read and check every file. Exit status 1 if there is a problem and no --repair."""
    with open_directories(directories, key_file) as opened:
        n_quarantined = sum(files.n_quarantined for files in opened)
        n_blocks = sum(len(files.rows()) for files in opened)
        problems = []
        for files in opened:
            with progress_bar(f"checking {files.root}") as report:
                problems += files.verify(repair=repair, on_read=report)
    if as_json:
        listed = [{"tier": p.tier, "location": p.location, "description": p.description} for p in problems]
        print_json({"blocks": n_blocks, "problems": listed, "quarantined": n_quarantined, "repaired": repair})
    else:
        for problem in problems:
            echo(one_line(f"{problem.location}: {problem.description}"))
        if n_quarantined:
            moved = format_count(n_quarantined, "unknown file")
            echo(f"{moved} moved to damaged/: not in the index, and not a block")
        found = format_count(len(problems), "problem") + (", repaired" if repair and problems else "")
        echo(f"{format_count(n_blocks, 'block')} checked, {found}")
    return 1 if problems and not repair else 0


@click.command()
@directories_option
@key_file_option
@click.option(
    "--quota", type=parse_size, metavar="SIZE", help="Also evict the least recently used blocks, down to this size."
)
@json_option
def gc(directories: tuple[Path, ...], key_file: Path | None, quota: int | None, as_json: bool) -> None:
    """Remove files of dead processes and unreachable blocks, and make the index match the files."""
    reports = []
    with open_directories(directories, key_file) as opened:
        for files in opened:
            done = files.gc(quota)
            pinned = files.pinned()
            if as_json:
                removed = {
                    "removed_blocks": done.removed.n_blocks,
                    "removed_bytes": done.removed.n_bytes,
                    "pinned_bytes": pinned.n_bytes,
                }
                reports.append({"directory": str(files.root), **done._asdict()} | removed)
                del reports[-1]["removed"]
            else:
                leftovers = f"{format_count(done.leftovers, 'file')} of dead processes removed"
                index = (
                    f"{format_count(done.adopted, 'file')} added to the index, "
                    f"{format_count(done.forgotten, 'missing file')} removed from it"
                )
                kept = f", {format_size(pinned.n_bytes)} pinned" if pinned.n_blocks else ""
                echo(f"{one_line(str(files.root))}: {_removed_text(done.removed)}; {leftovers}, {index}{kept}")
    if as_json:
        print_json(reports)


def _removed_text(removed: BlockTotals) -> str:
    return f"{format_count(removed.n_blocks, 'block')} removed, {format_size(removed.n_bytes)}"


@click.command()
@directories_option
@key_file_option
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Remove all blocks and pins, the tokens of texts, and the files in damaged/.",
)
@click.option(
    "--namespace",
    "-n",
    "prefixes",
    multiple=True,
    metavar="KEY",
    help="Remove blocks of this namespace. A prefix of its key is enough. Can be repeated.",
)
@click.option(
    "--older-than", type=parse_age, metavar="AGE", help="Remove blocks not used for this long, such as 7d or 12h."
)
@click.option(
    "--to-size", type=parse_size, metavar="SIZE", help="Remove the least recently used blocks, down to this size."
)
@json_option
def evict(
    directories: tuple[Path, ...],
    key_file: Path | None,
    everything: bool,
    prefixes: tuple[str, ...],
    older_than: float | None,
    to_size: int | None,
    as_json: bool,
) -> None:
    """Remove stored blocks. With --namespace and --older-than, both conditions must hold.

    Only --all removes pinned blocks.
    """
    has_condition = bool(prefixes) or older_than is not None
    if has_condition + everything + (to_size is not None) != 1:
        raise click.UsageError("pass --all, or --to-size, or one or both of --namespace and --older-than")
    before = None if older_than is None else time.time_ns() - int(older_than * 1e9)
    total = BlockTotals(0, 0)
    with open_directories(directories, key_file) as opened:
        namespaces = matching_namespaces(opened, prefixes)
        for files in opened:
            if to_size is not None:
                removed = files.shrink(to_size)
            else:
                removed = files.evict(namespaces, used_before=before, pinned=everything)
            if everything:
                files.remove_pins_texts_and_damaged()
            total = BlockTotals(total.n_blocks + removed.n_blocks, total.n_bytes + removed.n_bytes)
    if as_json:
        print_json({"removed_blocks": total.n_blocks, "removed_bytes": total.n_bytes})
    else:
        echo(_removed_text(total))


@click.command("wipe")
@directories_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def wipe_command(directories: tuple[Path, ...], yes: bool, as_json: bool) -> None:
    """Remove all content of a directory that no other process uses. Needs no key.

    Removes blocks, pins, texts, stored responses and damaged files. Files are removed, not overwritten: an SSD or a
    file system with a journal or snapshots may keep their bytes. The bytes of an encrypted directory are unreadable
    once all copies of its key file are destroyed.
    """
    removed = []
    for location in resolve_directories(directories):
        encrypted = is_cache(location.path) and is_encrypted(location.path)
        if not yes:
            click.confirm(f"Remove all content of {one_line(str(location.path))}?", abort=True, err=True)
        totals = wipe(location.path)
        removed.append((location.path, totals, encrypted))
    if as_json:
        print_json(
            [
                {
                    "directory": str(path),
                    "removed_blocks": totals.n_blocks,
                    "removed_bytes": totals.n_bytes,
                    "encrypted": encrypted,
                }
                for path, totals, encrypted in removed
            ]
        )
        return
    for path, totals, encrypted in removed:
        promise = (
            "to make remains on the medium unreadable, destroy all copies of its key file"
            if encrypted
            else "it was not encrypted, so its bytes may stay on the medium until they are overwritten"
        )
        echo(f"{one_line(str(path))}: {_removed_text(totals)}; {promise}")
