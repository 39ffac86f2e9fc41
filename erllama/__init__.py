"""Run GGUF models through llama.cpp, with an exact and persistent prompt cache.

    import erllama

    cache = erllama.Cache(ram="2GiB", disk="~/.cache/erllama")
    with erllama.load_model("model.gguf", cache=cache) as model:
        reply = model.complete("Once upon a time", max_tokens=64)
        print(reply.text, reply.cache.kind)

The KV of every token is computed once, stored once, reused exactly, and survives a restart. All public names are in
this namespace.
"""

import logging
import sys
from typing import TYPE_CHECKING

import erllama._runtime.at_exit  # noqa: F401 - registered first, so the program's own exit functions run before it
from erllama._runtime.imports import import_safely

if TYPE_CHECKING:
    from erllama._demo.model import demo_model
    from erllama._model.adapters import Adapter
    from erllama._model.info import Device, ModelInfo, devices
    from erllama._model.load import load_backend, load_model
    from erllama._model.model import Model
    from erllama._model.registry import get_model, list_models, queue_depth
    from erllama._model.requests.chat_streams import AsyncChatStream, ChatStream
    from erllama._model.requests.scoring import Score
    from erllama._model.requests.speculation import Verification
    from erllama._model.requests.streams import AsyncStream, Stream
    from erllama._model.requests.tool_runs import AsyncToolStream, ToolRun, ToolStream
    from erllama._process.options import ProcessOptions
    from erllama.cache import Cache, MemoryUsage, Pin, Policy, Pressure, SaveReason
    from erllama.chat.functions import ToolResult
    from erllama.chat.results import ChatCompletion, Usage
    from erllama.chat.templates.template import render_chat_template
    from erllama.engine import (
        Buffer,
        CacheDelta,
        CacheHit,
        Candidates,
        Completion,
        Delta,
        Done,
        Drafter,
        Drafts,
        EngineMetrics,
        Event,
        Grammar,
        OrderedRowsStep,
        SamplingState,
        SpecialToken,
        TextDelta,
        ThinkingDelta,
        ThinkingEnd,
        Timings,
        TokenLogprobs,
        ToolCall,
        ToolCallDelta,
        ToolCallEnd,
    )
    from erllama.errors import (
        AdapterLoadError,
        AdapterUnloaded,
        AlreadyLoaded,
        BackendError,
        CacheError,
        CacheFormatError,
        CacheKeyError,
        CacheVersionError,
        CalledFromModelThread,
        CellsExhausted,
        ChatError,
        DeadlineExceeded,
        DownloadError,
        Error,
        EventsError,
        GrammarError,
        IntegrityError,
        LibraryNotBuilt,
        LoadCancelled,
        MemoryLimitExceeded,
        MissingPackage,
        ModelFailed,
        ModelLoadError,
        ModelMismatch,
        ModelNameError,
        ModelNotFound,
        ModelUnloaded,
        OptionError,
        PinError,
        PinQuotaExceeded,
        PromptError,
        PromptTooLong,
        QueueFull,
        RequestCrashed,
        SamplingError,
        ServerLost,
        SessionBusy,
        StateError,
        TemplateError,
        ToolCallError,
        Unsupported,
        VocabularyOnly,
    )
    from erllama.events.options import KvEvents

__version__ = "0.1.0"

# A library must not print log messages: without handlers of the program, they are discarded.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# The public names by module, as above. A module is imported when one of its names is first used: all modules
# together take half a second to import, and import numpy, jinja2, llguidance, sqlite_utils and watchdog.
_NAMES_BY_MODULE: dict[str, tuple[str, ...]] = {
    "erllama._model.adapters": ("Adapter",),
    "erllama._model.requests.chat_streams": ("AsyncChatStream", "ChatStream"),
    "erllama._demo.model": ("demo_model",),
    "erllama._model.info": ("Device", "ModelInfo", "devices"),
    "erllama._model.load": ("load_backend", "load_model"),
    "erllama._model.model": ("Model",),
    "erllama._model.registry": ("get_model", "list_models", "queue_depth"),
    "erllama._model.requests.scoring": ("Score",),
    "erllama._model.requests.speculation": ("Verification",),
    "erllama._model.requests.streams": ("AsyncStream", "Stream"),
    "erllama._model.requests.tool_runs": ("AsyncToolStream", "ToolRun", "ToolStream"),
    "erllama._process.options": ("ProcessOptions",),
    "erllama.cache": ("Cache", "MemoryUsage", "Pin", "Policy", "Pressure", "SaveReason"),
    "erllama.chat.functions": ("ToolResult",),
    "erllama.chat.results": ("ChatCompletion", "Usage"),
    "erllama.chat.templates.template": ("render_chat_template",),
    "erllama.engine": (
        "Buffer",
        "CacheDelta",
        "CacheHit",
        "Candidates",
        "Completion",
        "Delta",
        "Done",
        "Drafter",
        "Drafts",
        "EngineMetrics",
        "Event",
        "Grammar",
        "OrderedRowsStep",
        "SpecialToken",
        "SamplingState",
        "TextDelta",
        "ThinkingDelta",
        "ThinkingEnd",
        "Timings",
        "TokenLogprobs",
        "ToolCall",
        "ToolCallDelta",
        "ToolCallEnd",
    ),
    "erllama.events.options": ("KvEvents",),
    "erllama.errors": (
        "AdapterLoadError",
        "AdapterUnloaded",
        "AlreadyLoaded",
        "BackendError",
        "CacheError",
        "CacheFormatError",
        "CacheKeyError",
        "CacheKeyError",
        "CacheVersionError",
        "CalledFromModelThread",
        "CellsExhausted",
        "ChatError",
        "DeadlineExceeded",
        "DownloadError",
        "Error",
        "EventsError",
        "GrammarError",
        "IntegrityError",
        "LibraryNotBuilt",
        "LoadCancelled",
        "MemoryLimitExceeded",
        "MissingPackage",
        "ModelFailed",
        "ModelLoadError",
        "ModelMismatch",
        "ModelNameError",
        "ModelNotFound",
        "ModelUnloaded",
        "OptionError",
        "PinError",
        "PinQuotaExceeded",
        "PromptError",
        "PromptTooLong",
        "QueueFull",
        "RequestCrashed",
        "SamplingError",
        "ServerLost",
        "SessionBusy",
        "StateError",
        "TemplateError",
        "ToolCallError",
        "Unsupported",
        "VocabularyOnly",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}
_SUBMODULES = ("cache", "chat", "engine", "errors", "llama_cpp", "models")

__all__ = [
    "Adapter",
    "AdapterLoadError",
    "AdapterUnloaded",
    "AlreadyLoaded",
    "AsyncChatStream",
    "AsyncStream",
    "AsyncToolStream",
    "BackendError",
    "Buffer",
    "Cache",
    "CacheDelta",
    "CacheError",
    "CacheFormatError",
    "CacheHit",
    "CacheKeyError",
    "CacheVersionError",
    "CalledFromModelThread",
    "Candidates",
    "CellsExhausted",
    "ChatCompletion",
    "ChatError",
    "ChatStream",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "Device",
    "Done",
    "DownloadError",
    "Drafter",
    "Drafts",
    "EngineMetrics",
    "Error",
    "Event",
    "EventsError",
    "Grammar",
    "GrammarError",
    "IntegrityError",
    "KvEvents",
    "LibraryNotBuilt",
    "LoadCancelled",
    "MemoryLimitExceeded",
    "MemoryUsage",
    "MissingPackage",
    "Model",
    "ModelFailed",
    "ModelInfo",
    "ModelLoadError",
    "ModelMismatch",
    "ModelNameError",
    "ModelNotFound",
    "ModelUnloaded",
    "OptionError",
    "OrderedRowsStep",
    "Pin",
    "PinError",
    "PinQuotaExceeded",
    "Policy",
    "Pressure",
    "ProcessOptions",
    "PromptError",
    "PromptTooLong",
    "QueueFull",
    "RequestCrashed",
    "SamplingError",
    "SamplingState",
    "SaveReason",
    "Score",
    "ServerLost",
    "SessionBusy",
    "SpecialToken",
    "StateError",
    "Stream",
    "TemplateError",
    "TextDelta",
    "ThinkingDelta",
    "ThinkingEnd",
    "Timings",
    "TokenLogprobs",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallError",
    "ToolResult",
    "ToolRun",
    "ToolStream",
    "Unsupported",
    "Usage",
    "Verification",
    "VocabularyOnly",
    "__version__",
    "demo_model",
    "devices",
    "get_model",
    "list_models",
    "load_backend",
    "load_model",
    "queue_depth",
    "render_chat_template",
]

if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> object:
        """Import the module of a public name, or a subpackage, at its first use."""
        # Needs no lock: the import system has its own, and several threads may import the same module.
        if name in _SUBMODULES:
            return import_safely(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
            )
        value = getattr(import_safely(_MODULE_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_SUBMODULES})
