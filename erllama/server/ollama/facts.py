"""What Ollama's clients ask about a model: its size, its family and what it can do."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from erllama.server.conduct.bodies import Json
from erllama.server.models import ConfiguredModel
from erllama.server.models.description import ModelDescription

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_SIZES = {"Small": "S", "Medium": "M", "Large": "L"}


def chat_template(model: ModelDescription) -> str:
    """Return the source of the chat template in the model's file; "" if it has none."""
    return str(model.metadata.get("tokenizer.chat_template", ""))


def capabilities(model: ModelDescription) -> list[str]:
    """Return what the model can do, in Ollama's words."""
    info, template = model.info, chat_template(model)
    if model.metadata.get(f"{info.architecture}.pooling_type") is not None:
        return ["embedding"]
    found = ["completion"]
    if "tools" in template:
        found.append("tools")
    if {"fim_pre", "fim_suf", "fim_mid"} <= info.special_tokens.keys():
        found.append("insert")
    if model.can_think:
        found.append("thinking")
    return found


def details(model: ModelDescription) -> Json:
    """Return `details` of a model."""
    info = model.info
    return {
        "parent_model": "",
        "format": "gguf" if model.metadata else "",
        "family": info.architecture,
        "families": [info.architecture] if info.architecture else None,
        "parameter_size": _count(info.n_params),
        "quantization_level": _quantization(info.quantization),
    }


def summary(name: str, model: ModelDescription) -> Json:
    """Return what the lists of models have of each.

    `digest` identifies the model by its metadata and sizes. It is not the checksum of its file: that would require
    reading the whole file.
    """
    info = model.info
    named = (name, info.architecture, info.name, info.quantization, info.n_params, info.file_bytes)
    return {
        "name": name,
        "model": name,
        "size": info.file_bytes,
        "digest": hashlib.sha256(repr(named).encode()).hexdigest(),
        "details": details(model),
    }


def created_at(model: ConfiguredModel) -> str:
    """Return the time at which a model became one of the server's."""
    return timestamp(datetime.fromtimestamp(model.created, UTC))


def timestamp(time: datetime) -> str:
    """Return a time as RFC 3339 has it, in UTC."""
    return time.isoformat().replace("+00:00", "Z")


def now() -> str:
    """Return the present time."""
    return timestamp(datetime.now(UTC))


def _count(number: int) -> str:
    """Return a number of parameters, such as "7.6B"."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number) if number else ""


def _quantization(name: str) -> str:
    """Return a type of weights as Ollama writes it: "Q4_K_M" for "Q4_K - Medium"."""
    kind, _, size = name.removeprefix("all ").partition(" - ")
    return f"{kind}_{_SIZES[size]}" if size in _SIZES else kind
