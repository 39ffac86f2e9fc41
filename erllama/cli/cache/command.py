"""`erllama cache`: what is stored. The commands that change it are beside this."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from erllama._runtime.printing import say
from erllama.cache.admin.maintenance import CacheFiles, ContextSummary, NamespaceSummary
from erllama.cli.cache.archives import export_command, import_command
from erllama.cli.cache.directories import directories_option, json_option, opened
from erllama.cli.cache.maintenance import evict, gc, verify
from erllama.cli.console import ago, count, print_facts, print_json, print_table, size


@click.group()
def cache() -> None:
    """Look after what is stored of prompts.

    All of it may be done while other processes use the directory.
    """


@cache.command()
@directories_option
@json_option
def stats(directories: tuple[Path, ...], as_json: bool) -> None:
    """How much is stored, by directory and by namespace: one for each model, with its options."""
    found: list[dict[str, object]] = []
    with opened(directories) as found_in:
        for files in found_in:
            namespaces = files.namespaces()
            usage = _usage(files, namespaces)
            if as_json:
                found.append(usage | {"namespaces": [_namespace_json(each) for each in namespaces]})
                continue
            print_facts(
                [
                    ("directory", str(files.root)),
                    ("tier", files.tier + _state(files)),
                    ("stored", _stored(namespaces)),
                    ("index", size(int(str(usage["index_bytes"])))),
                    ("free space", size(int(str(usage["free_bytes"])))),
                ]
            )
            say()
            if namespaces:
                _print_namespaces(namespaces)
    if as_json:
        print_json(found)


def _usage(files: CacheFiles, namespaces: list[NamespaceSummary]) -> dict[str, object]:
    return {
        "directory": str(files.root),
        "tier": files.tier,
        "in_use": files.in_use,
        "read_only": files.read_only,
        "contexts": sum(each.n_contexts for each in namespaces),
        "blocks": sum(each.n_blocks for each in namespaces),
        "tokens": sum(each.n_tokens for each in namespaces),
        "bytes": sum(each.n_bytes for each in namespaces),
        "index_bytes": sum(path.stat().st_size for path in files.root.glob("index.db*")),
        "free_bytes": shutil.disk_usage(files.root).free,
    }


def _state(files: CacheFiles) -> str:
    return (", read-only" if files.read_only else "") + (", in use by others" if files.in_use else "")


def _stored(namespaces: list[NamespaceSummary]) -> str:
    blocks, tokens = sum(each.n_blocks for each in namespaces), sum(each.n_tokens for each in namespaces)
    return f"{count(blocks, 'block')}, {count(tokens, 'token')}, {size(sum(each.n_bytes for each in namespaces))}"


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
                size(n.n_bytes),
                ago(n.last_used),
            ]
            for n in namespaces
        ],
    )


@cache.command("ls")
@directories_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The N that were used last.")
@json_option
def list_contexts(directories: tuple[Path, ...], limit: int | None, as_json: bool) -> None:
    """The stored contexts, the latest used first; what they share counts for each."""
    with opened(directories) as found_in:
        found = [(files, context) for files in found_in for context in files.contexts()]
    found.sort(key=lambda each: each[1].last_used, reverse=True)
    found = found[:limit]
    if as_json:
        print_json([_context_json(files, context) for files, context in found])
        return
    numbers = [(title, "right") for title in ("tokens", "blocks", "size", "last used")]
    print_table(
        [("context", "left"), ("namespace", "left"), ("tier", "left"), *numbers],
        [
            [
                context.key.hex()[:16] + ("" if context.complete else " (cut off)"),
                context.namespace.hex()[:16],
                files.tier,
                f"{context.n_tokens:,}",
                f"{context.n_blocks:,}",
                size(context.n_bytes),
                ago(context.last_used),
            ]
            for files, context in found
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


for command in (verify, gc, evict, export_command, import_command):
    cache.add_command(command)
