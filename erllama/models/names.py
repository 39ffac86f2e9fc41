"""Names of models: the list of local models, and the file that a name means.

`local_models` reads all stores. `find_model` finds a name in them, and `model_path` also accepts paths. Every
command, `load_model` and the server's configuration call `model_path`, so that a name means the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from erllama.checks import shown
from erllama.errors import ModelNameError, OptionError
from erllama.models.catalogue import CATALOGUE, by_name
from erllama.models.local_model import LocalModel, with_unique_names
from erllama.models.stores import hugging_face, llama_cpp, lm_studio, ollama
from erllama.models.stores.own_directories import models_directory, models_in, own_directories
from erllama.models.stores.walk import log

_MOST_CANDIDATES = 8  # of an error message
_SIMILARITY = 0.6
_PATH_MARKS = ("./", "../", "~", os.sep)


def local_models(directories: Iterable[str | Path] = ()) -> list[LocalModel]:
    """Return the models on this machine, those that cannot be loaded with the reason. Only reads the stores.

    Args:
        directories: further directories, before those of the variable ERLLAMA_MODELS.

    Returns:
        The models in the order of the stores: own directories, those of `erllama pull`, the cache of
        huggingface_hub, LM Studio's, Ollama's, and llama.cpp's. A name that two stores have means the model of the
        first one.
    """
    models: list[LocalModel] = []
    for read in _readers(directories):
        try:
            models += with_unique_names(list(read()))
        except OSError as error:
            log.warning("a store of models cannot be read: %s", error)
    return models


def _readers(directories: Iterable[str | Path]) -> Iterator[Callable[[], Iterable[LocalModel]]]:
    own = [*(Path(each).expanduser() for each in directories), *own_directories()]
    short_names = {Path(model.gguf).name: model.name for model in CATALOGUE}
    yield lambda: models_in(own, "directory")
    yield lambda: models_in([models_directory()], "erllama", short_names)
    yield lambda: hugging_face.models(hugging_face.cache_directory())
    for store in (lm_studio, ollama, llama_cpp):
        for root in store.roots():
            yield lambda store=store, root=root: store.models(root)  # type: ignore[misc]


def find_model(name: str, directories: Iterable[str | Path] = ()) -> LocalModel:
    """Return the local model of a name: an exact match, in any case, or the only one that begins so.

    Args:
        directories: as for `local_models`.

    Raises:
        ModelNameError: no model has the name, several begin so, or the model with that name cannot be loaded. The
            attribute `candidates` has names that could be meant.
    """
    models = local_models(directories)
    wanted = name.casefold()
    broken = None
    for model in models:
        if any(each.casefold() == wanted for each in model.names):
            if not model.problem:
                return model
            broken = broken or model
    if broken is not None:
        raise ModelNameError(f"the model {shown(name)} ({broken.store}) cannot be loaded: {broken.problem}")
    usable = [model for model in models if not model.problem]
    found = _different(
        model for model in usable if wanted and any(each.casefold().startswith(wanted) for each in model.names)
    )
    if len(found) == 1:
        return found[0]
    raise _not_found(name, found, usable)


def has_model(name: str, directories: Iterable[str | Path] = ()) -> bool:
    """Return whether a local model that can be loaded has exactly this name, in any case."""
    wanted = name.casefold()
    return any(
        each.casefold() == wanted
        for model in local_models(directories)
        if not model.problem
        for each in model.names
    )


def model_path(model: str | Path, directories: Iterable[str | Path] = (), *, base: Path | None = None) -> Path:
    """Return the file of a model, by its path or its name. A path always wins.

    A `Path`, a text that is the path of an existing file, and a text that looks like a path (it ends in ".gguf", or
    begins with "/", "./", "../" or "~") are paths; whether their file exists is not checked. All else is a name.

    Args:
        directories: as for `local_models`.
        base: where relative paths start; None for the current directory.

    Raises:
        ModelNameError: no local model has the name.
        OptionError: `model` is not a text or a `Path`, is empty, or begins with the "~" of an unknown user.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise OptionError(f"path={shown(model)}; pass the path of a GGUF file, or the name of a model")
    try:
        path = (base or Path()) / Path(model).expanduser()
    except RuntimeError as error:
        raise OptionError(f"path={shown(model)}: {error}") from None
    if isinstance(model, Path) or is_path(model) or _is(path, Path.is_file):
        return path
    try:
        return find_model(model, directories).path
    except ModelNameError as error:
        if not _is(path, Path.is_dir):
            raise
        message = f"{shown(model)} is a directory, and no model on this machine has this name"
        raise ModelNameError(f"{message}; pass the path of a file", candidates=error.candidates) from None


def is_path(text: str) -> bool:
    """Return whether a text looks like a path, and is never a name."""
    return text.startswith(_PATH_MARKS) or text.lower().endswith(".gguf") or "\0" in text


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Return whether a path is a file, or a directory."""
    try:
        return kind(path)
    except (OSError, ValueError):  # a text that cannot be a path, such as a very long one
        return False


def _different(models: Iterable[LocalModel]) -> list[LocalModel]:
    """Return models without those whose file an earlier one has, too."""
    by_file: dict[str, LocalModel] = {}
    for model in models:
        by_file.setdefault(os.path.realpath(model.path), model)
    return list(by_file.values())


def _not_found(name: str, found: Sequence[LocalModel], usable: Sequence[LocalModel]) -> ModelNameError:
    if found:
        candidates = [model.name for model in found]
        message = f"several models begin with {shown(name)}: {_listed(candidates)}; write more of the name"
        return ModelNameError(message, candidates=tuple(candidates))
    candidates = [model.name for model in _similar(name, usable)]
    message = f"{shown(name)} is neither a file nor the name of a model on this machine"
    if candidates:
        message += f"; did you mean {_listed(candidates)}?"
    elif usable:
        message += f"; there are {_listed([model.name for model in usable])}"
    if by_name(name) is not None or name.startswith("hf:"):
        message += f"; `erllama pull {name}` downloads it"
    else:
        message += "; `erllama models` lists them, and `erllama pull` downloads one"
    return ModelNameError(message, candidates=tuple(candidates))


def _similar(name: str, models: Sequence[LocalModel]) -> list[LocalModel]:
    wanted = name.casefold()

    def similarity(model: LocalModel) -> float:
        names = [each.casefold() for each in model.names]
        return max(1.0 if wanted in each else SequenceMatcher(None, wanted, each).ratio() for each in names)

    rated = sorted(((similarity(model), model) for model in _different(models)), key=lambda pair: -pair[0])
    return [model for value, model in rated if value >= _SIMILARITY]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_CANDIDATES
    return ", ".join(names[:_MOST_CANDIDATES]) + (f" and {more} more" if more > 0 else "")
