"""The adapters of a backend, and the check of an adapter file against a model, before libllama loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from erllama.engine.backends.file_identity import file_identity
from erllama.engine.backends.gguf_parts import parts
from erllama.engine.backends.llama_file import check_file
from erllama.engine.backends.llama_library import llama_ffi, translate_errors
from erllama.errors import AdapterLoadError, BackendError, ModelLoadError


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


@dataclass(slots=True, eq=False)
class _Adapter:
    """An adapter. `native` is replaced when the model is loaded again."""

    path: Path
    identity: str
    native: llama_ffi.LlamaAdapter


class LlamaAdapters:
    """The adapters that a backend has loaded. Used by the model thread alone."""

    def __init__(self) -> None:
        self._loaded: list[_Adapter] = []

    @property
    def natives(self) -> list[llama_ffi.LlamaAdapter]:
        """libllama's adapters, in the order of their load."""
        return [adapter.native for adapter in self._loaded]

    def load(self, model: llama_ffi.LlamaModel, path: Path) -> object:
        """Load a file that was checked. Returns the adapter, for the other methods.

        Raises:
            llama_ffi.LlamaError: libllama cannot load it.
            ModelLoadError: the file cannot be read.
        """
        adapter = _Adapter(path, file_identity(path), llama_ffi.LlamaAdapter(model, path))
        self._loaded.append(adapter)
        return adapter

    def loaded(self, adapters: Sequence[tuple[object, float]]) -> list[tuple[llama_ffi.LlamaAdapter, float]]:
        """Return libllama's adapters, with their scales.

        Raises:
            BackendError: an object is not an adapter that `load` returned.
        """
        found = [(adapter.native, scale) for adapter, scale in adapters if isinstance(adapter, _Adapter)]
        if len(found) < len(adapters):
            raise BackendError("an adapter that libllama did not load")
        return found

    def load_again(self, model: llama_ffi.LlamaModel) -> None:
        """Load all adapters for a model that replaces the one of `load`.

        Raises:
            BackendError: a file was changed, or cannot be read.
            llama_ffi.LlamaError: libllama cannot load an adapter.
        """
        for adapter in self._loaded:
            try:
                changed = file_identity(adapter.path) != adapter.identity
            except ModelLoadError as error:
                raise BackendError(str(error)) from error
            if changed:
                raise BackendError(f"{adapter.path} was changed since it was loaded; unload the adapter")
            old, adapter.native = adapter.native, llama_ffi.LlamaAdapter(model, adapter.path)
            old.close()

    def free(self, adapter: object) -> None:
        if adapter in self._loaded and isinstance(adapter, _Adapter):
            self._loaded.remove(adapter)
            adapter.native.close()

    def close(self) -> None:
        for native in self.natives:
            native.close()
