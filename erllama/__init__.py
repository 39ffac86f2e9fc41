"""Run GGUF models through llama.cpp and keep prompts warm.

    import erllama

    cache = erllama.Cache(ram="2GiB", disk="~/.cache/erllama")
    with erllama.load_model("model.gguf", cache=cache) as model:
        reply = model.complete("Once upon a time", max_tokens=64)
        print(reply.text, reply.cache.kind)

Every token's KV is computed once, stored once, found again exactly, and
survives a restart. Everything a user needs is in this namespace.
"""

from erllama._model import Model, Stream, load_backend, load_model
from erllama._registry import get_model, list_models
from erllama.cache import Cache, MemoryUsage, Policy, Pressure, SaveReason
from erllama.engine.request import CacheHit, Completion, Done, Event, TextDelta, Timings
from erllama.errors import (
    AlreadyLoaded,
    BackendError,
    CacheError,
    CacheFormatError,
    Error,
    IntegrityError,
    LibraryNotBuilt,
    LoadCancelled,
    ModelLoadError,
    ModelNotFound,
    ModelUnloaded,
    OptionError,
    PromptError,
    PromptTooLong,
    SamplingError,
    StateError,
)

__version__ = "0.1.0"

__all__ = [
    "AlreadyLoaded",
    "BackendError",
    "Cache",
    "CacheError",
    "CacheFormatError",
    "CacheHit",
    "Completion",
    "Done",
    "Error",
    "Event",
    "IntegrityError",
    "LibraryNotBuilt",
    "LoadCancelled",
    "MemoryUsage",
    "Model",
    "ModelLoadError",
    "ModelNotFound",
    "ModelUnloaded",
    "OptionError",
    "Policy",
    "Pressure",
    "PromptError",
    "PromptTooLong",
    "SamplingError",
    "SaveReason",
    "StateError",
    "Stream",
    "TextDelta",
    "Timings",
    "__version__",
    "get_model",
    "list_models",
    "load_backend",
    "load_model",
]
