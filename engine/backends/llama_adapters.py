"""The check of an adapter file against a model, before libllama loads it."""

from __future__ import annotations

from pathlib import Path

from erllama.engine.backends.gguf_parts import parts
from erllama.engine.backends.llama_file import check_file
from erllama.engine.backends.llama_library import llama_ffi, translate_errors
from erllama.errors import AdapterLoadError, ModelLoadError


def check_adapter_file(path: Path, model: Path, architecture: str) -> None:
    """Check that a file is an adapter for a model.

    Args:
        path: the adapter's file.
        model: the model's file, or the first part of a split model. Its header lists the tensors.
        architecture: the model's architecture.

    Raises:
        AdapterLoadError: the file is missing, not GGUF, not an adapter, truncated, or for another model.
    """
    try:
        check_file(path)
        with translate_errors(AdapterLoadError, f"the model's file {model}, which the check needs, cannot be read"):
            tables = [llama_ffi.read_tensor_table(part) for part in parts(model)]
        weights = {tensor.name: tensor for _, tensors in tables for tensor in tensors}
        with translate_errors(AdapterLoadError, f"{path} cannot be loaded"):
            llama_ffi.check_adapter(path, architecture, weights)
    except ModelLoadError as error:
        raise AdapterLoadError(str(error)) from None
    except OSError as error:
        raise AdapterLoadError(f"{path} cannot be read: {error}") from None
