"""`Model.load_adapter`: files checked, named by their content and loaded, and what a user holds of one."""

from __future__ import annotations

from pathlib import Path
from typing import Never

from erllama._model.fingerprint import content_digest
from erllama._model.requests import Requests
from erllama.checks import reject_unknown
from erllama.engine import ModelThread
from erllama.engine.adapters import AdapterBackend, LoadedAdapter, checked_scale
from erllama.engine.backends.file_identity import file_identity
from erllama.errors import AdapterLoadError, ModelLoadError, OptionError, Unsupported


class Adapter:
    """A LoRA adapter of a model. Made by `Model.load_adapter`; safe to use from any thread."""

    def __init__(self, loaded: LoadedAdapter, runner: ModelThread) -> None:
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
        """Its file."""
        return self._loaded.path

    @property
    def sha256(self) -> str:
        """Of its file's content, in hex."""
        return self._loaded.digest

    @property
    def loaded(self) -> bool:
        """Whether requests that are made now are computed with it, unless its scale is 0."""
        return self._loaded in self._runner.adapters.loaded

    @property
    def scale(self) -> float:
        """How much it changes the model: 1.0 as it was trained, 0.0 not at all; of one that is unloaded, the last.

        Set, it is that of requests made from then on; those that run or wait keep theirs.

        Raises:
            OptionError: set to no finite number.
            AdapterUnloaded: set when it is unloaded.
            ModelUnloaded: set when its model is unloaded.
        """
        return self._loaded.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        checked = checked_scale(scale)
        self._runner.check()
        self._runner.adapters.set_scale(self._loaded, checked)

    def unload(self) -> None:
        """Compute requests made from now on without it. Idempotent; waits for nothing.

        Those that run or wait keep it, and its memory is freed when the last of them has ended.
        """
        self._runner.unload_adapter(self._loaded)


class AdapterMethods(Requests):
    """What `Model` has of this."""

    def load_adapter(self, path: str | Path, *, scale: float = 1.0, **unknown: Never) -> Adapter:
        """Load a LoRA adapter, with which all requests made from then on are computed.

        At any time, from any thread; those that run or wait go on as they were. The cache keeps what was computed
        with other adapters, or other scales of them, apart.

        Args:
            path: a GGUF file.
            scale: how much it changes the model; 0.0 for not at all, for now.

        Raises:
            AdapterLoadError: the file is none for this model.
            OptionError: an option is unknown, ill-typed or out of range.
            Unsupported: the model's backend has no adapters, or the model only encodes.
            ModelUnloaded: the model is unloaded.
            CalledFromModelThread: by a callback that the model's own thread runs.
        """
        reject_unknown(unknown, ("scale",), "load_adapter")
        if not isinstance(path, str | Path) or not str(path):
            raise OptionError(f"path={path!r}; give the path of a GGUF file")
        checked = checked_scale(scale)
        self._check_generates()
        self._runner.check_caller()
        if not isinstance(self._backend, AdapterBackend):
            raise Unsupported(
                f"model {self.id!r} takes no adapters: its backend, {type(self._backend).__name__}, has no "
                "`load_adapter`; use load_model, or a backend that has one"
            )
        try:
            file = Path(path).expanduser()
        except RuntimeError as error:
            raise OptionError(f"path={path!r}: {error}") from None
        self._backend.check_adapter(file)
        try:
            before = file_identity(file)
            digest = content_digest(file, self.cache)
        except ModelLoadError as error:
            raise AdapterLoadError(str(error)) from None
        loaded = self._runner.load_adapter(file, digest, checked, lambda: _is_still(file, before))
        return Adapter(loaded, self._runner)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Those that are loaded, in the order of loading."""
        if not isinstance(self._backend, AdapterBackend):
            return ()
        return tuple(Adapter(loaded, self._runner) for loaded in self._runner.adapters.loaded)


def _is_still(file: Path, before: str) -> bool:
    try:
        return file_identity(file) == before
    except ModelLoadError:
        return False
