"""Adapter files for libllama: whether one is good for a model, before libllama sees it."""

from __future__ import annotations

from pathlib import Path

from erllama.engine.backends.gguf_parts import parts
from erllama.engine.backends.llama_file import check_file
from erllama.engine.backends.llama_library import llama_ffi, translated
from erllama.errors import AdapterLoadError, ModelLoadError


def check_adapter_file(path: Path, model: Path, architecture: str) -> None:
    """Refuse a file that is no adapter for a model.

    Args:
        path: of the adapter.
        model: of the model's file, the first part of a split one; its header tells what can be adapted.
        architecture: the model's.

    Raises:
        AdapterLoadError: it is missing, no GGUF file, no adapter, cut short, or for another model.
    """
    try:
        check_file(path)
        with translated(AdapterLoadError, f"{model} cannot be read any more, and tells what can be adapted"):
            tables = [llama_ffi.read_tensor_table(part) for part in parts(model)]
        weights = {tensor.name: tensor for _, tensors in tables for tensor in tensors}
        with translated(AdapterLoadError, f"{path} cannot be loaded"):
            llama_ffi.check_adapter(path, architecture, weights)
    except ModelLoadError as error:
        raise AdapterLoadError(str(error)) from None
    except OSError as error:
        raise AdapterLoadError(f"{path} cannot be read: {error}") from None
