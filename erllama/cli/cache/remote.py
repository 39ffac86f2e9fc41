"""`erllama cache remote stats`, `verify` and `gc`: the remote tier, as an operator sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from erllama._runtime.printing import echo, one_line
from erllama.cache.options import checked_key_file
from erllama.cache.remote.options import RemoteOptions, create_remote_tier, remote_options
from erllama.cache.remote.tier import RemoteTier
from erllama.cache.sizes import format_size
from erllama.cache.tiers.tier import TierRow
from erllama.cli.cache.directories import json_option
from erllama.cli.console import format_age, format_count, print_fields, print_json, print_table
from erllama.cli.options import key_file_option

_address = click.argument("address", envvar="ERLLAMA_REMOTE")
_signing_key_file = click.option(
    "--remote-key-file",
    "signing_key_file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="ERLLAMA_REMOTE_KEY_FILE",
    help="File of the keys that sign what is stored there. Default: that of --key-file.",
)


@click.group()
def remote() -> None:
    """Inspect and clean up a remote tier: a bucket or a mounted directory that machines share.

    ADDRESS is that of `--remote`, such as s3://bucket/prefix. These commands are safe while machines use it.
    """


@contextmanager
def _opened(
    address: str, signing_key_file: Path | None, key_file: Path | None, *, read_only: bool
) -> Iterator[RemoteTier]:
    options = remote_options(address, signing_key_file, 2**62, None, read_only, checked_key_file(key_file))
    assert isinstance(options, RemoteOptions)
    tier = create_remote_tier(options)
    try:
        tier.open()
        tier.read_all()
        yield tier
    finally:
        tier.close()


@remote.command("stats")
@_address
@_signing_key_file
@key_file_option
@json_option
def stats(address: str, signing_key_file: Path | None, key_file: Path | None, as_json: bool) -> None:
    """Show how much is stored, by namespace, and how many manifests there are."""
    with _opened(address, signing_key_file, key_file, read_only=True) as tier:
        rows, location, manifests = list(tier.rows()), tier.location, tier.n_manifests
        refused = tier.counts().get("remote_manifests_refused", 0)
        n_unknown = tier.counts().get("remote_unknown_keys", 0)
    by_namespace: dict[bytes, list[TierRow]] = defaultdict(list)
    for row in rows:
        by_namespace[row.block.namespace].append(row)
    total = sum(row.n_bytes for row in rows)
    if as_json:
        namespaces = [
            {
                "namespace": key.hex(),
                "blocks": len(found),
                "tokens": sum(row.block.n_tokens for row in found),
                "bytes": sum(row.n_bytes for row in found),
                "last_used": max(row.last_used for row in found) / 1e9,
            }
            for key, found in by_namespace.items()
        ]
        counts = {"blocks": len(rows), "bytes": total, "manifests": manifests, "manifests_refused": refused}
        print_json({"address": location, **counts, "unknown_keys": n_unknown, "namespaces": namespaces})
        return
    shown = f"{manifests}" + (f", and {refused} refused" if refused else "")
    if n_unknown:
        shown += f"; {format_count(n_unknown, 'manifest')} with content that other keys encrypt"
    tokens = format_count(sum(row.block.n_tokens for row in rows), "token")
    print_fields(
        [
            ("address", location),
            ("stored", f"{format_count(len(rows), 'block')}, {tokens}, {format_size(total)}"),
            ("manifests", shown),
        ]
    )
    if by_namespace:
        echo()
        numbers = [(title, "right") for title in ("blocks", "tokens", "size", "last used")]
        print_table(
            [("namespace", "left"), *numbers],
            [
                [
                    key.hex()[:16],
                    f"{len(found):,}",
                    f"{sum(row.block.n_tokens for row in found):,}",
                    format_size(sum(row.n_bytes for row in found)),
                    format_age(max(row.last_used for row in found)),
                ]
                for key, found in by_namespace.items()
            ],
        )


@remote.command("verify")
@_address
@_signing_key_file
@key_file_option
@json_option
def verify(address: str, signing_key_file: Path | None, key_file: Path | None, as_json: bool) -> int:
    """Read every block and check its signature. Exit status 1 if there is a problem.

    The traffic is that of all blocks.
    """
    with _opened(address, signing_key_file, key_file, read_only=True) as tier:
        n_blocks, problems = len(list(tier.rows())), list(tier.verify())
    if as_json:
        print_json({"blocks": n_blocks, "problems": [problem._asdict() for problem in problems]})
    else:
        for problem in problems:
            echo(one_line(f"{problem.location}: {problem.description}"))
        echo(f"{format_count(n_blocks, 'block')} checked, {format_count(len(problems), 'problem')}")
    return 1 if problems else 0


@remote.command("gc")
@_address
@_signing_key_file
@key_file_option
@json_option
def gc(address: str, signing_key_file: Path | None, key_file: Path | None, as_json: bool) -> None:
    """Merge the manifests, and remove objects older than a day that none of them lists.

    If manifests cannot be read, such as those of other keys, no object is removed, because they may list it.
    """
    with _opened(address, signing_key_file, key_file, read_only=False) as tier:
        before = tier.n_manifests
        n_removed = tier.collect_garbage()
        after, problem = tier.n_manifests, tier.unread_problem
    if as_json:
        manifests = {"manifests_before": before, "manifests_after": after}
        print_json({"removed": n_removed, **manifests, "problem": problem})
    else:
        removed = format_count(n_removed, "object")
        echo(f"{one_line(address)}: {removed} removed, {before} manifests merged into {after}")
        if problem is not None:
            echo(one_line(f"{problem}, so no object was removed"))
