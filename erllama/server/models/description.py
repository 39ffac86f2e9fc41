"""Descriptions of models for the lists of the APIs, of those that are not loaded, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import erllama
from erllama._model.info import ModelInfo
from erllama._model.load import load_model
from erllama._model.model import Model
from erllama.cache import Cache
from erllama.chat.thinking import find_thinking_markers
from erllama.engine.backends.llama_library import llama_ffi, translate_errors
from erllama.engine.backends.quantizations import quantization_of
from erllama.errors import Error, ModelLoadError
from erllama.server.models.entry import ModelEntry
from erllama.server.models.memory import needed_memory
from erllama.server.models.served import ServedModel

_DEFAULT_SLOTS = 4  # of `load_model`


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What the APIs say about a model.

    Attributes:
        info: its properties. Those that its file does not have are empty.
        metadata: of its file; empty if that cannot be read.
        chat_template: the template that its replies use; "" without one.
        can_think: whether the chat template has markers of thinking.
        fingerprint: what computes the replies, as of `ServedModel`.
    """

    info: ModelInfo
    metadata: Mapping[str, object]
    chat_template: str
    can_think: bool
    fingerprint: str


def describe_loaded(served: ServedModel) -> ModelDescription:
    """Return the description of a loaded model."""
    template = served.defaults.get("chat_template")
    metadata = served.model.metadata
    return ModelDescription(
        info=served.model.info,
        metadata=metadata,
        chat_template=str(metadata.get("tokenizer.chat_template", "") if template is None else template),
        can_think=served.can_think,
        fingerprint=served.fingerprint,
    )


def describe_file(entry: ModelEntry) -> ModelDescription:
    """Return the description of a model that is not loaded. Reads the header of its file.

    Raises:
        Error: the file cannot be read.
        OSError: the same.
    """
    needed = needed_memory(entry)
    overrides = entry.options.get("overrides")
    with (
        Cache(ram=0) as none,
        load_model(entry.path, vocab_only=True, cache=none, overrides=overrides) as model,  # type: ignore[arg-type]
    ):
        metadata = dict(model.metadata)
        n_slots = entry.options.get("n_seq_max", _DEFAULT_SLOTS)
        info = replace(
            model.info,
            id=entry.id,
            vocab_only=False,
            n_ctx=needed.n_ctx,
            n_seq_max=n_slots if isinstance(n_slots, int) else _DEFAULT_SLOTS,
            quantization=_quantization(entry.path, metadata),
            pid=0,
        )
        return ModelDescription(
            info=info,
            metadata=metadata,
            chat_template=str(metadata.get("tokenizer.chat_template", "")),
            can_think=_can_think(model),
            fingerprint=f"{llama_ffi.build_info()['source']}-erllama-{erllama.__version__}",
        )


def _quantization(path: Path, metadata: Mapping[str, object]) -> str:
    """Return how most weights of a file are stored; "" if its number is not one of the commonest."""
    with translate_errors(ModelLoadError, f"{path} cannot be read"):
        return quantization_of(metadata, llama_ffi.read_tensor_table(path)[1])


def no_description(entry: ModelEntry) -> ModelDescription:
    """Return the description of a model whose file cannot be read."""
    info = ModelInfo(
        id=entry.id,
        backend="llama",
        description="",
        vocab_only=False,
        n_ctx=0,
        n_vocab=0,
        n_seq_max=0,
        phase="idle",
        pending=0,
        queue_depth=0,
    )
    return ModelDescription(info=info, metadata={}, chat_template="", can_think=False, fingerprint="")


def _can_think(model: Model) -> bool:
    try:
        return find_thinking_markers(model._chat_requests.chats.templates.choose(None).source) is not None
    except Error:  # a template that does not parse
        return False
