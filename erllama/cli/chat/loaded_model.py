"""The model of a chat, which `/model` replaces by another one."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import erllama
from erllama.cli.loading import ModelOptions, existing_path
from erllama.models.names import find_model, is_path, local_models, model_path


class LoadedModel:
    """One loaded model and its file. All models of a chat have one cache, and are loaded with the same options.

    Attributes:
        model: the loaded model.
        path: its file.
        name: its name; if the user loaded it by its path, that of the file without ".gguf".
    """

    def __init__(self, loading: ModelOptions, cache: erllama.Cache, path: Path, name: str | None) -> None:
        self._loading, self._cache = loading, cache
        self.path, self.name = path, _shown_name(name, path)
        self.model = loading.load(path, cache)

    def switch(self, name: str) -> bool:
        """Unload the model, and load another one by its path or name. If that fails, load the old one again.

        Both are never loaded at once: there may be memory for one only. The unloaded model's prompts are saved.

        Returns:
            False if the model is loaded already.

        Raises:
            ModelNameError, ModelLoadError: no model has this path or name, or it cannot be loaded.
        """
        path = existing_path(model_path(name))
        if path.samefile(self.path):
            return False
        self.model.unload()
        try:
            self.model = self._loading.load(path, self._cache)
        except BaseException:
            self.model = self._loading.load(self.path, self._cache)
            raise
        self.path, self.name = path, _shown_name(name, path)
        return True

    def list(self) -> str:
        """Return the names of the models on this machine, one a line, with a mark at the loaded one."""
        others = [
            f"  {each.name}  {each.n_bytes / 1e9:.2f} GB"
            for each in local_models()
            if not each.problem and each.path.exists() and not each.path.samefile(self.path)
        ]
        return "\n".join([f"* {self.name}  {self.path}", *others])

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.model.unload()


def _shown_name(name: str | None, path: Path) -> str:
    """Return the whole name of a model that the user loaded by a part of it."""
    by_path = name is None or is_path(name) or Path(name).exists()
    return path.stem if by_path else find_model(str(name)).name
