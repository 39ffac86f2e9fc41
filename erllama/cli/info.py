"""`erllama info`: what a model file is, from its header alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

import erllama
from erllama._model.fingerprint import Fingerprint
from erllama._runtime.printing import say
from erllama.cli.console import print_facts, print_json, progress, size
from erllama.cli.loading import plain_file
from erllama.cli.options import DIRECTORY, chosen_model, model_argument

# ggml's names for types of weights; libllama gives the numbers that files have.
# fmt: off
_TYPES = (
    "f64", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2_K", "q3_K", "q4_K",
    "q5_K", "q6_K", "q8_K", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl",
    "iq4_xs", "tq1_0", "tq2_0", "mxfp4", "i8", "i16", "i32", "i64",
)
# fmt: on


@click.command()
@model_argument
@click.option("--fingerprint", is_flag=True, help="Read all of it, and tell what the cache calls its content.")
@click.option("--metadata", is_flag=True, help="All of the file's metadata, too; of arrays, how long they are.")
@click.option(
    "--cache-dir", type=DIRECTORY, envvar="ERLLAMA_CACHE_DIR", help="Where that is remembered; the user's."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(model: Path | None, fingerprint: bool, metadata: bool, cache_dir: Path | None, as_json: bool) -> None:
    """What a model is, from its file's header alone."""
    path = plain_file(chosen_model(model))
    with erllama.Cache(ram=0) as cache, erllama.load_model(path, vocab_only=True, cache=cache) as words:
        found = _facts(path, words)
        if metadata:
            found["metadata"] = {name: _value(value) for name, value in words.metadata.items()}
    if fingerprint:
        found["fingerprint"] = _fingerprint(path, cache_dir)
    if as_json:
        print_json(found)
        return
    print_facts(
        [(name.replace("_", " "), _text(name, value)) for name, value in found.items() if name != "metadata"]
    )
    if metadata:
        say()
        print_facts([(name, str(value)) for name, value in found["metadata"].items()])  # type: ignore[attr-defined]


def _facts(path: Path, words: erllama.Model) -> dict[str, object]:
    known = words.info
    types = _weight_types(path)
    return {
        "file": str(path),
        "bytes": known.file_bytes,
        "name": known.name,
        "architecture": known.architecture,
        "parameters": known.n_params,
        "weights": types,
        "bits_per_weight": round(8 * sum(types.values()) / known.n_params, 2) if known.n_params else 0.0,
        "context": known.n_ctx_train,
        "layers": known.n_layer,
        "embedding": known.n_embd,
        "heads": known.n_head,
        "kv_heads": known.n_head_kv,
        "vocabulary": known.n_vocab,
        "tokenizer": str(words.metadata.get("tokenizer.ggml.model", "")),
        "chat_template": known.has_chat_template,
        "special_tokens": {name: [token.id, token.text] for name, token in known.special_tokens.items()},
    }


def _weight_types(path: Path) -> dict[str, int]:
    """Bytes of the weights by type, most first; of all parts of a split file."""
    # Imported here: what needs no model works where libllama was never built.
    from erllama.engine.backends.gguf_parts import parts
    from erllama.engine.backends.llama_library import llama_ffi, translate_errors

    names = {llama_ffi.ggml_type(name): name for name in _TYPES}
    found: Counter[str] = Counter()
    for part in parts(path):
        with translate_errors(erllama.ModelLoadError, f"{part} cannot be read"):
            for tensor in llama_ffi.read_tensor_table(part)[1]:
                found[names.get(tensor.ggml_type, f"type {tensor.ggml_type}")] += tensor.n_bytes
    return dict(found.most_common())


def _fingerprint(path: Path, cache_dir: Path | None) -> str:
    # Remembered, so that the next load need not read the file; with no limit, so that nothing goes for it.
    with erllama.Cache(ram=0, disk=cache_dir or True, disk_quota=2**62) as cache:
        if not cache.persistent:
            raise erllama.CacheError(str(cache.disk_error))
        with progress(f"reading {path.name}") as tell:
            return Fingerprint().of(path, cache, tell)


def _value(value: object) -> object:
    """A metadata value for people and JSON."""
    if isinstance(value, bool | int | float | str):
        return value
    return f"[{len(value)} values]" if hasattr(value, "__len__") else str(value)


def _text(name: str, value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{size(value)} ({value:,} bytes)" if name == "bytes" else f"{value:,}"
        case dict() if name == "weights":
            return ", ".join(f"{kind} {size(n_bytes)}" for kind, n_bytes in value.items())
        case dict():
            return ", ".join(f"{purpose} {token[1]!r} ({token[0]})" for purpose, token in value.items())
    return str(value)
