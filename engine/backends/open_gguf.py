"""Opens GGUF files: checks the file, names its content for the cache, and loads it.

`load_model` calls it, in the caller's process or in the process of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from erllama.cache import Cache
from erllama.engine.backends.file_identity import identity
from erllama.engine.backends.fingerprint import Fingerprint
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.backends.llama_file import check_file
from erllama.engine.backends.llama_options import LlamaOptions
from erllama.errors import ModelLoadError

ProgressCallback = Callable[[float], object]


def open_gguf(
    file: Path, options: LlamaOptions, naming: Fingerprint, cache: Cache, on_progress: ProgressCallback | None
) -> LlamaBackend:
    """Return the backend of a GGUF file.

    Args:
        naming: how the cache names the file's content.
        cache: remembers the digests of files.
        on_progress: called with the fraction done, 0.0 to 1.0; returning False cancels.

    Raises:
        ModelLoadError: the file cannot be loaded, or changes while it is loaded.
        LoadCancelled: `on_progress` returned False.
    """
    check_file(file)
    progress = _Progress(on_progress)
    before = identity(file)
    fingerprint = naming.of(file, cache, progress.report_reading)
    backend = LlamaBackend(file, options, fingerprint, progress.report_loading, before)
    if identity(file) != before:
        backend.close()
        raise ModelLoadError(f"{file} was changed while it was loaded; load it again when it is complete")
    return backend


class _Progress:
    """Reports one fraction for two steps: reading files for their fingerprint, if that is needed, and loading."""

    def __init__(self, report: ProgressCallback | None) -> None:
        self._report = report
        self._done = 0.0

    def report_reading(self, fraction: float) -> object:
        self._done = 0.5
        return self._report(fraction / 2) if self._report else None

    def report_loading(self, fraction: float) -> object:
        return self._report(self._done + (1 - self._done) * fraction) if self._report else None
