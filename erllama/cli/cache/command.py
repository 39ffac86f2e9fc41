"""`erllama cache`: the command group, and its commands `stats` and `ls`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from erllama._runtime.printing import echo
from erllama.cache.admin.maintenance import CacheFiles, ContextSummary, NamespaceSummary
from erllama.cache.sizes import format_size
from erllama.cli.cache.archives import export_command, import_command
from erllama.cli.cache.directories import directories_option, json_option, open_directories
from erllama.cli.cache.keys import new_key, rekey
from erllama.cli.cache.maintenance import evict, gc, verify, wipe_command
from erllama.cli.cache.pins import list_pins, pin_command, unpin_command
from erllama.cli.cache.remote import remote
from erllama.cli.console import format_age, format_count, print_fields, print_json, print_table
from erllama.cli.options import key_file_option


@click.group()
def cache() -> None:
    """Inspect and manage the prompt cache.

    All of these commands are safe while other processes use the directory.
    """


@cache.command()
@directories_option
@key_file_option
@json_option
def stats(directories: tuple[Path, ...], key_file: Path | None, as_json: bool) -> None:
    """Show how much is stored, by directory and by namespace.

    A namespace is one model with one set of the options that change its KV.
    """
    reports: list[dict[str, object]] = []
    with open_directories(directories, key_file) as opened:
        for files in opened:
            namespaces = files.namespaces()
            usage = _usage(files, namespaces)
            if as_json:
                reports.append(usage | {"namespaces": [_namespace_json(each) for each in namespaces]})
                continue
            print_fields(
                [
                    ("directory", str(files.root)),
                    ("tier", files.tier + _status(files)),
                    ("encryption", _encryption(files)),
                    ("stored", _totals(namespaces)),
                    ("pinned", _pinned(files)),
                    ("index", format_size(int(str(usage["index_bytes"])))),
                    ("free space", format_size(int(str(usage["free_bytes"])))),
                ]
            )
            echo()
            if namespaces:
                _print_namespaces(namespaces)
    if as_json:
        print_json(reports)


def _usage(files: CacheFiles, namespaces: list[NamespaceSummary]) -> dict[str, object]:
    return {
        "directory": str(files.root),
        "tier": files.tier,
        "encrypted": files.keys is not None,
        "keys": [] if files.keys is None else list(files.keys.key_ids),
        "in_use": files.in_use,
        "read_only": files.read_only,
        "contexts": sum(each.n_contexts for each in namespaces),
        "blocks": sum(each.n_blocks for each in namespaces),
        "tokens": sum(each.n_tokens for each in namespaces),
        "bytes": sum(each.n_bytes for each in namespaces),
        "pins": len(files.pins()),
        "pinned_bytes": files.pinned().n_bytes,
        "index_bytes": sum(path.stat().st_size for path in files.root.glob("index.db*")),
        "free_bytes": shutil.disk_usage(files.root).free,
    }


def _status(files: CacheFiles) -> str:
    return (", read-only" if files.read_only else "") + (", in use by another process" if files.in_use else "")


def _encryption(files: CacheFiles) -> str:
    if files.keys is None:
        return "none"
    current, *others = files.keys.key_ids
    return f"key {current}" + (f", and {', '.join(others)} until `erllama cache rekey` ends" if others else "")


def _totals(namespaces: list[NamespaceSummary]) -> str:
    blocks, tokens = sum(each.n_blocks for each in namespaces), sum(each.n_tokens for each in namespaces)
    n_bytes = sum(each.n_bytes for each in namespaces)
    return f"{format_count(blocks, 'block')}, {format_count(tokens, 'token')}, {format_size(n_bytes)}"


def _pinned(files: CacheFiles) -> str:
    return f"{format_size(files.pinned().n_bytes)}, {format_count(len(files.pins()), 'pin')}"


def _print_namespaces(namespaces: list[NamespaceSummary]) -> None:
    numbers = [(title, "right") for title in ("contexts", "blocks", "tokens", "size", "last used")]
    print_table(
        [("namespace", "left"), *numbers],
        [
            [
                n.key.hex()[:16],
                f"{n.n_contexts:,}",
                f"{n.n_blocks:,}",
                f"{n.n_tokens:,}",
                format_size(n.n_bytes),
                format_age(n.last_used),
            ]
            for n in namespaces
        ],
    )


@cache.command("ls")
@directories_option
@key_file_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Show only the N most recently used.")
@json_option
def list_contexts(directories: tuple[Path, ...], key_file: Path | None, limit: int | None, as_json: bool) -> None:
    """List the stored contexts, most recently used first. A block shared by several contexts counts for each."""
    with open_directories(directories, key_file) as opened:
        contexts = [(files, context) for files in opened for context in files.contexts()]
    contexts.sort(key=lambda each: each[1].last_used, reverse=True)
    contexts = contexts[:limit]
    if as_json:
        print_json([_context_json(files, context) for files, context in contexts])
        return
    numbers = [(title, "right") for title in ("tokens", "blocks", "size", "last used")]
    print_table(
        [("context", "left"), ("namespace", "left"), ("tier", "left"), *numbers],
        [
            [
                context.key.hex()[:16] + ("" if context.complete else " (incomplete)"),
                context.namespace.hex()[:16],
                files.tier,
                f"{context.n_tokens:,}",
                f"{context.n_blocks:,}",
                format_size(context.n_bytes),
                format_age(context.last_used),
            ]
            for files, context in contexts
        ],
    )


def _namespace_json(namespace: NamespaceSummary) -> dict[str, object]:
    return {
        "namespace": namespace.key.hex(),
        "contexts": namespace.n_contexts,
        "blocks": namespace.n_blocks,
        "tokens": namespace.n_tokens,
        "bytes": namespace.n_bytes,
        "last_used": namespace.last_used / 1e9,
    }


def _context_json(files: CacheFiles, context: ContextSummary) -> dict[str, object]:
    return {
        "context": context.key.hex(),
        "namespace": context.namespace.hex(),
        "directory": str(files.root),
        "tier": files.tier,
        "tokens": context.n_tokens,
        "blocks": context.n_blocks,
        "bytes": context.n_bytes,
        "complete": context.complete,
        "last_used": context.last_used / 1e9,
    }


for command in (
    verify,
    gc,
    evict,
    new_key,
    rekey,
    wipe_command,
    export_command,
    import_command,
    pin_command,
    list_pins,
    unpin_command,
    remote,
):
    cache.add_command(command)
