"""`erllama info`: describes a model file from its header."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

import erllama
from erllama._runtime.printing import echo
from erllama.cache.sizes import format_size
from erllama.cli.console import print_fields, print_json, progress_bar
from erllama.cli.loading import existing_path
from erllama.cli.options import DIRECTORY, key_file_option, model_argument, model_or_demo
from erllama.engine.backends.fingerprint import Fingerprint

# ggml's names of tensor types. Files have their numbers, which libllama maps to the names.
# fmt: off
_TYPES = (
    "f64", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2_K", "q3_K", "q4_K",
    "q5_K", "q6_K", "q8_K", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl",
    "iq4_xs", "tq1_0", "tq2_0", "mxfp4", "i8", "i16", "i32", "i64",
)
# fmt: on


@click.command()
@model_argument
@click.option(
    "--fingerprint", is_flag=True, help="Read the whole file and print its fingerprint, its name in the cache."
)
@click.option("--metadata", is_flag=True, help="Print all metadata of the file; for an array, its length.")
@click.option(
    "--cache-dir",
    type=DIRECTORY,
    envvar="ERLLAMA_CACHE_DIR",
    help="Cache directory that stores the fingerprint. Default: the user's cache directory.",
)
@key_file_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(
    model: str | None,
    fingerprint: bool,
    metadata: bool,
    cache_dir: Path | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Describe a model file. Reads its header only."""
    path = existing_path(model_or_demo(model))
    with erllama.Cache(ram=0) as cache, erllama.load_model(path, vocab_only=True, cache=cache) as vocabulary:
        fields = _fields(path, vocabulary)
        if metadata:
            fields["metadata"] = {name: _metadata_value(value) for name, value in vocabulary.metadata.items()}
    if fingerprint:
        fields["fingerprint"] = _fingerprint(path, cache_dir, key_file)
    if as_json:
        print_json(fields)
        return
    print_fields(
        [(name.replace("_", " "), _field_text(name, value)) for name, value in fields.items() if name != "metadata"]
    )
    if metadata:
        echo()
        print_fields([(name, str(value)) for name, value in fields["metadata"].items()])  # type: ignore[attr-defined]


def _fields(path: Path, vocabulary: erllama.Model) -> dict[str, object]:
    info = vocabulary.info
    types = _weight_types(path)
    return {
        "file": str(path),
        "bytes": info.file_bytes,
        "name": info.name,
        "architecture": info.architecture,
        "parameters": info.n_params,
        "weights": types,
        "bits_per_weight": round(8 * sum(types.values()) / info.n_params, 2) if info.n_params else 0.0,
        "context": info.n_ctx_train,
        "layers": info.n_layer,
        "embedding": info.n_embd,
        "heads": info.n_head,
        "kv_heads": info.n_head_kv,
        "vocabulary": info.n_vocab,
        "tokenizer": str(vocabulary.metadata.get("tokenizer.ggml.model", "")),
        "chat_template": info.has_chat_template,
        "special_tokens": {name: [token.id, token.text] for name, token in info.special_tokens.items()},
    }


def _weight_types(path: Path) -> dict[str, int]:
    """Return the bytes of the weights by type, the largest first; of all parts of a split file."""
    # Imported here: commands that need no model work without a build of libllama.
    from erllama.engine.backends.gguf_parts import parts
    from erllama.engine.backends.llama_library import llama_ffi, translate_errors

    names = {llama_ffi.ggml_type(name): name for name in _TYPES}
    n_bytes: Counter[str] = Counter()
    for part in parts(path):
        with translate_errors(erllama.ModelLoadError, f"{part} cannot be read"):
            for tensor in llama_ffi.read_tensor_table(part)[1]:
                n_bytes[names.get(tensor.ggml_type, f"type {tensor.ggml_type}")] += tensor.n_bytes
    return dict(n_bytes.most_common())


def _fingerprint(path: Path, cache_dir: Path | None, key_file: Path | None) -> str:
    # Stored in the cache, so that the next load need not read the file. Without a quota, no block is evicted.
    with erllama.Cache(ram=0, disk=cache_dir or True, disk_quota=2**62, key_file=key_file) as cache:
        if not cache.persistent:
            raise erllama.CacheError(str(cache.disk_error))
        with progress_bar(f"reading {path.name}") as report:
            return Fingerprint().of(path, cache, report)


def _metadata_value(value: object) -> object:
    """Return a metadata value for printing; for an array, its length."""
    if isinstance(value, bool | int | float | str):
        return value
    return f"[{len(value)} values]" if hasattr(value, "__len__") else str(value)


def _field_text(name: str, value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{format_size(value)} ({value:,} bytes)" if name == "bytes" else f"{value:,}"
        case dict() if name == "weights":
            return ", ".join(f"{kind} {format_size(n_bytes)}" for kind, n_bytes in value.items())
        case dict():
            return ", ".join(f"{purpose} {token[1]!r} ({token[0]})" for purpose, token in value.items())
    return str(value)
