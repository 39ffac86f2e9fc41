"""LoRA adapters of one model: files checked, identified by their content and loaded.

`AdapterLoader` does the work of `Model.load_adapter`, which returns an `Adapter`.
"""

from __future__ import annotations

from pathlib import Path

from erllama._model.requests.prompts import PromptReader
from erllama._model.runner import ModelRunner
from erllama.cache import Cache
from erllama.engine import Backend
from erllama.engine.adapters import AdapterBackend, LoadedAdapter, check_scale
from erllama.engine.backends.file_identity import file_identity
from erllama.engine.backends.fingerprint import content_digest
from erllama.errors import AdapterLoadError, ModelLoadError, OptionError, Unsupported


class Adapter:
    """A LoRA adapter of a model. `Model.load_adapter` creates it. Safe to use from any thread."""

    def __init__(self, loaded: LoadedAdapter, runner: ModelRunner) -> None:
        self._loaded, self._runner = loaded, runner

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and other._loaded is self._loaded

    def __hash__(self) -> int:
        return hash(self._loaded)

    def __repr__(self) -> str:
        state = f"scale {self.scale}" if self.loaded else "unloaded"
        return f"<erllama.Adapter {str(self.path)!r}, {state}>"

    @property
    def path(self) -> Path:
        """The adapter's file."""
        return self._loaded.path

    @property
    def sha256(self) -> str:
        """SHA-256 of the file's content, in hex."""
        return self._loaded.digest

    @property
    def loaded(self) -> bool:
        """Whether requests submitted now use the adapter. At scale 0.0 it is loaded and has no effect."""
        return self._loaded in self._runner.adapters.loaded

    @property
    def scale(self) -> float:
        """How strongly the adapter changes the model: 1.0 as it was trained, 0.0 without effect.

        A new scale applies to requests submitted from then on. Running and waiting requests keep the scale that
        they were submitted with. An unloaded adapter keeps its last scale.

        Raises:
            OptionError: the new scale is not a finite number.
            AdapterUnloaded: the scale of an unloaded adapter was set.
            ModelUnloaded: the scale was set after the model was unloaded.
        """
        return self._loaded.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        checked = check_scale(scale)
        self._runner.check()
        self._runner.adapters.set_scale(self._loaded, checked)

    def unload(self) -> None:
        """Remove the adapter from requests submitted from now on. Idempotent; returns at once.

        Running and waiting requests keep it. Its memory is freed when the last of them ends.
        """
        self._runner.unload_adapter(self._loaded)


class AdapterLoader:
    """Loads and lists the adapters of one model. Thread-safe.

    Args:
        id: the model's id, for error messages.
        cache: remembers the digests of files.
    """

    def __init__(self, backend: Backend, id: str, cache: Cache, runner: ModelRunner, prompts: PromptReader) -> None:
        self._backend, self._id, self._cache = backend, id, cache
        self._runner, self._prompts = runner, prompts

    def load(self, path: object, scale: object) -> Adapter:
        """Load a file; see `Model.load_adapter`."""
        if not isinstance(path, str | Path) or not str(path):
            raise OptionError(f"path={path!r}; pass the path of a GGUF file")
        checked = check_scale(scale)
        self._prompts.check_generates()
        self._runner.check_caller()
        if not isinstance(self._backend, AdapterBackend):
            raise Unsupported(
                f"model {self._id!r} takes no adapters: its backend, {type(self._backend).__name__}, has no "
                "`load_adapter`; use load_model, or a backend that has one"
            )
        try:
            file = Path(path).expanduser()
        except RuntimeError as error:
            raise OptionError(f"path={path!r}: {error}") from None
        self._backend.check_adapter(file)
        try:
            before = file_identity(file)
            digest = content_digest(file, self._cache)
        except ModelLoadError as error:
            raise AdapterLoadError(str(error)) from None
        loaded = self._runner.load_adapter(file, digest, checked, lambda: _is_unchanged(file, before))
        return Adapter(loaded, self._runner)

    def loaded(self) -> tuple[Adapter, ...]:
        """Return the loaded adapters in the order of loading."""
        if not isinstance(self._backend, AdapterBackend):
            return ()
        return tuple(Adapter(loaded, self._runner) for loaded in self._runner.adapters.loaded)


def _is_unchanged(file: Path, before: str) -> bool:
    try:
        return file_identity(file) == before
    except ModelLoadError:
        return False
