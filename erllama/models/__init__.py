"""Models by name: those on this machine, their downloads, and whether they fit the memory.

    from erllama import models

    for model in models.local_models():
        print(model.name, model.store, model.n_bytes, model.problem)

`stores` reads the directories of Ollama, LM Studio, huggingface_hub and llama.cpp, and the user's own. `names`
finds a name in them. `download` gets models, only on request. `fit` compares a model with the free memory. Imports
run from `download` and `fit` to `names`, `stores` and `local_model`.
"""

from typing import TYPE_CHECKING

from erllama._runtime.imports import import_safely

if TYPE_CHECKING:
    from erllama.models.description import ModelDescription, describe_model
    from erllama.models.download.pull import pull
    from erllama.models.fit import Fit, fit_model
    from erllama.models.local_model import LocalModel
    from erllama.models.names import find_model, local_models

_MODULE_OF = {
    "Fit": "erllama.models.fit",
    "LocalModel": "erllama.models.local_model",
    "ModelDescription": "erllama.models.description",
    "describe_model": "erllama.models.description",
    "find_model": "erllama.models.names",
    "fit_model": "erllama.models.fit",
    "local_models": "erllama.models.names",
    "pull": "erllama.models.download.pull",
}

__all__ = [
    "Fit",
    "LocalModel",
    "ModelDescription",
    "describe_model",
    "find_model",
    "fit_model",
    "local_models",
    "pull",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import the module of a public name at its first use."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_safely(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
