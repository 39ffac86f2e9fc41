"""Models in the user's own directories and in that of `erllama pull`.

A model is named by its file, without ".gguf". The directories are those of the variable `ERLLAMA_MODELS`, separated
as in PATH, and of the configuration file of a server.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import platformdirs

from erllama.models.local_model import LocalModel, model_files
from erllama.models.stores.environment import directories_of, directory_of
from erllama.models.stores.walk import walk

VARIABLE = "ERLLAMA_MODELS"
CACHE_VARIABLE = "ERLLAMA_MODEL_CACHE"


def models_directory() -> Path:
    """Return the directory of the models that `erllama pull` gets from the package index; it may not exist."""
    return directory_of(CACHE_VARIABLE) or Path(platformdirs.user_cache_dir("erllama")) / "models"


def own_directories() -> list[Path]:
    """Return the directories of the variable ERLLAMA_MODELS."""
    return directories_of(VARIABLE)


def models_in(roots: Iterable[Path], store: str, short_names: Mapping[str, str] | None = None) -> list[LocalModel]:
    """Return the models below directories.

    Args:
        short_names: further names, by file name.
    """
    different = {os.path.realpath(root): root for root in reversed([*roots])}
    found = [(root, file) for root in reversed(different.values()) for file in model_files(walk(root))]
    counts = Counter(file.stem for _, file in found)
    models = []
    for root, file in found:
        inner = (file.path.parent.relative_to(root) / file.stem).as_posix()
        # Of two files with one name, each is named by its place in the directory.
        name = file.stem if counts[file.stem] == 1 else inner
        short = (short_names or {}).get(file.path.name)
        aliases = tuple(each for each in (short, inner) if each and each != name)
        models.append(LocalModel(name, file.path, store, file.n_bytes, aliases, file.problem))
    return models
