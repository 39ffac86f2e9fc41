"""What the header of a model's file says about it: `ModelDescription`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from erllama.models.local_model import quantization_in


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Properties of a model, from the header of its file.

    Attributes:
        architecture: such as "llama".
        quantization: how most weights are stored, such as "Q4_K_M"; "" if that is unknown.
        n_ctx_train: the context that the model was trained with, in tokens; 0 if the file does not say.
        has_chat_template: whether the file has a chat template.
        needed_bytes: estimated memory of the model with the default options of `load_model`.
    """

    architecture: str
    quantization: str
    n_ctx_train: int
    has_chat_template: bool
    needed_bytes: int


def describe_model(path: Path) -> ModelDescription:
    """Return the properties of a model. Reads the header of its file only.

    Raises:
        ModelLoadError: the file cannot be read, or is not GGUF.
    """
    # Imported here: lists and names work without a built libllama.
    from erllama.engine.backends.memory_estimate import ModelHeader
    from erllama.engine.backends.quantizations import quantization_of, short_quantization

    header = ModelHeader(path)
    named = short_quantization(quantization_of(header.metadata, header.files[0]))
    return ModelDescription(
        architecture=str(header.metadata.get("general.architecture", "")),
        quantization=named or quantization_in(path.stem),
        n_ctx_train=header.n_ctx_train,
        has_chat_template=bool(header.metadata.get("tokenizer.chat_template")),
        needed_bytes=header.estimate({}).total,
    )
