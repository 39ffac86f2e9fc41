"""`erllama cache verify`, `gc` and `evict`: whether what is stored is sound, and what of it may go."""

from __future__ import annotations

import time
from pathlib import Path

import click

from erllama._runtime.printing import one_line, say
from erllama.cache.admin.maintenance import RemovalResult
from erllama.cli.cache.directories import directories_option, json_option, named_namespaces, opened
from erllama.cli.console import count, print_json, progress, size
from erllama.cli.options import age, byte_size


@click.command()
@directories_option
@click.option("--repair", is_flag=True, help="Set damaged files aside, and bring index and files in line.")
@json_option
def verify(directories: tuple[Path, ...], repair: bool, as_json: bool) -> int:
    """Read every file and check it; exit status 1 where something is wrong and was not repaired."""
    with opened(directories) as found_in:
        n_quarantined = sum(files.n_quarantined for files in found_in)
        n_blocks = sum(len(files.rows()) for files in found_in)
        problems = []
        for files in found_in:
            with progress(f"checking {files.root}") as tell:
                problems += files.verify(repair=repair, on_read=tell)
    if as_json:
        wrong = [{"tier": p.tier, "place": p.place, "what": p.what} for p in problems]
        print_json({"blocks": n_blocks, "problems": wrong, "set_aside": n_quarantined, "repaired": repair})
    else:
        for problem in problems:
            say(one_line(f"{problem.place}: {problem.what}"))
        if n_quarantined:
            say(f"{count(n_quarantined, 'file')} that no index knew, and no block, set aside in damaged/")
        wrong_text = count(len(problems), "problem") + (", repaired" if repair and problems else "")
        say(f"{count(n_blocks, 'block')} checked, {wrong_text}")
    return 1 if problems and not repair else 0


@click.command()
@directories_option
@click.option(
    "--quota", type=byte_size, metavar="SIZE", help="Also evict what was not used for longest, down to this size."
)
@json_option
def gc(directories: tuple[Path, ...], quota: int | None, as_json: bool) -> None:
    """Remove what dead processes left and what nobody can reach; bring index and files in line."""
    found = []
    with opened(directories) as found_in:
        for files in found_in:
            done = files.gc(quota)
            if as_json:
                removed = {"removed_blocks": done.removed.n_blocks, "removed_bytes": done.removed.n_bytes}
                found.append({"directory": str(files.root), **done._asdict()} | removed)
                del found[-1]["removed"]
            else:
                others = f"{count(done.leftovers, 'file')} of dead processes removed, {done.adopted:,} adopted"
                removed_text = f"{one_line(str(files.root))}: {_gone(done.removed)}"
                say(f"{removed_text}; {others}, {done.forgotten:,} without a file forgotten")
    if as_json:
        print_json(found)


def _gone(removed: RemovalResult) -> str:
    return f"{count(removed.n_blocks, 'block')} removed, {size(removed.n_bytes)}"


@click.command()
@directories_option
@click.option("--all", "everything", is_flag=True, help="All of it: texts' tokens and files set aside, too.")
@click.option(
    "--namespace", "-n", "prefixes", multiple=True, metavar="KEY", help="Of this namespace; its beginning will do."
)
@click.option("--older-than", type=age, metavar="AGE", help="Not used for so long, as 7d or 12h.")
@click.option("--to-size", type=byte_size, metavar="SIZE", help="What was not used for longest, down to this size.")
@json_option
def evict(
    directories: tuple[Path, ...],
    everything: bool,
    prefixes: tuple[str, ...],
    older_than: float | None,
    to_size: int | None,
    as_json: bool,
) -> None:
    """Remove stored blocks. --namespace and --older-than together remove what is both."""
    chosen = bool(prefixes) or older_than is not None
    if chosen + everything + (to_size is not None) != 1:
        raise click.UsageError("give --all, or --to-size, or --namespace and --older-than")
    before = None if older_than is None else time.time_ns() - int(older_than * 1e9)
    total = RemovalResult(0, 0)
    with opened(directories) as found_in:
        among = named_namespaces(found_in, prefixes)
        for files in found_in:
            gone = files.shrink(to_size) if to_size is not None else files.evict(among, used_before=before)
            if everything:
                files.remove_texts_and_damaged()
            total = RemovalResult(total.n_blocks + gone.n_blocks, total.n_bytes + gone.n_bytes)
    if as_json:
        print_json({"removed_blocks": total.n_blocks, "removed_bytes": total.n_bytes})
    else:
        say(_gone(total))
