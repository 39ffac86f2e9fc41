"""`erllama fit`: shows whether a model fits the free memory, and with how much context."""

from __future__ import annotations

import click

from erllama._model.load import check_load_options
from erllama._runtime.printing import echo
from erllama.cache.sizes import format_size
from erllama.cli.console import print_fields, print_json
from erllama.cli.loading import existing_path
from erllama.cli.options import model_argument, model_or_demo, parse_assignments, parse_n_ctx
from erllama.models.fit import Fit, fit_model


@click.command()
@model_argument
@click.option(
    "--n-ctx",
    type=parse_n_ctx,
    metavar="N",
    help="Context size in tokens, or fit for the largest that fits. Default: the model's, up to 4096.",
)
@click.option("--n-seq-max", type=int, metavar="N", help="Number of requests at once. Default: 4.")
@click.option(
    "--load",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another option of load_model that changes memory, for example kv_type_k=q8_0. Can be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(
    model: str | None, n_ctx: int | str | None, n_seq_max: int | None, load: tuple[str, ...], as_json: bool
) -> int:
    """Show whether a model fits the free memory.

    Estimates the memory of its weights, its context and its computations from the header of its file, and prints
    the largest contexts that fit nine tenths of the free memory. Exit status 1 if the model does not fit.
    """
    asked = {"n_ctx": n_ctx, "n_seq_max": n_seq_max}
    options = {name: value for name, value in asked.items() if value is not None} | parse_assignments(
        load, "--load"
    )
    check_load_options(options)
    found = fit_model(existing_path(model_or_demo(model)), **options)
    if as_json:
        print_json(_plain(found))
    else:
        print_fields(_fields(found))
        echo()
        echo(_verdict(found))
    return 0 if found.fits else 1


def _fields(found: Fit) -> list[tuple[str, str]]:
    needed = found.estimate
    fields = [
        ("file", str(found.path)),
        ("weights", format_size(needed.weights)),
        (f"context of {needed.n_ctx:,} tokens", format_size(needed.kv + needed.state)),
        ("computing", format_size(needed.compute)),
        ("needed", format_size(needed.total)),
        ("free", format_size(found.free)),
    ]
    if needed.spare:
        fields.insert(-1, ("of which must be free", format_size(needed.least)))
    if not found.largest_n_ctx:
        fields.append(("largest context", "unknown: GPUs hold some of the layers, or do not report their memory"))
    for kind, n_ctx in found.largest_n_ctx.items():
        fields.append((f"largest context with {kind}", f"{n_ctx:,} tokens" if n_ctx else "none fits"))
    return fields


def _verdict(found: Fit) -> str:
    if found.fits and found.estimate.total > found.free:
        return "It can be loaded, but its weights do not all stay in memory: parts are read again from the disk."
    if found.fits:
        return f"It fits. The model was trained with a context of {found.n_ctx_train:,} tokens."
    ways = [f"--n-ctx {n_ctx} with KV of {kind}" for kind, n_ctx in found.largest_n_ctx.items() if n_ctx]
    if not found.largest_n_ctx:
        return "It does not fit. Try a smaller --n-ctx."
    return (
        f"It does not fit. {'These fit: ' + '; '.join(ways) if ways else 'No context fits: use a smaller model'}."
    )


def _plain(found: Fit) -> dict[str, object]:
    needed = found.estimate
    return {
        "file": str(found.path),
        "fits": found.fits,
        "n_ctx": needed.n_ctx,
        "weights_bytes": needed.weights,
        "kv_bytes": needed.kv,
        "state_bytes": needed.state,
        "compute_bytes": needed.compute,
        "needed_bytes": needed.total,
        "least_bytes": needed.least,
        "free_bytes": found.free,
        "n_ctx_train": found.n_ctx_train,
        "largest_n_ctx": dict(found.largest_n_ctx),
    }
