"""Run GGUF models through llama.cpp and keep prompts warm.

    import erllama

    cache = erllama.Cache(ram="2GiB", disk="~/.cache/erllama")
    with erllama.load_model("model.gguf", cache=cache) as model:
        reply = model.complete("Once upon a time", max_tokens=64)
        print(reply.text, reply.cache.kind)

Every token's KV is computed once, stored once, found again exactly, and
survives a restart. Everything a user needs is in this namespace.
"""

from erllama._adapters import Adapter
from erllama._chat import AsyncChatStream, ChatStream
from erllama._demo_model import demo_model
from erllama._info import Device, ModelInfo, devices
from erllama._load import load_backend, load_model
from erllama._model import Model
from erllama._registry import get_model, list_models, queue_depth
from erllama._scoring import Score
from erllama._speculation import Verification
from erllama._stream import AsyncStream, Stream
from erllama.cache import Cache, MemoryUsage, Policy, Pressure, SaveReason
from erllama.chat.results import ChatCompletion, Usage
from erllama.chat.templates import render_chat_template
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
    NotedToken,
    SamplingState,
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
    CalledFromModelThread,
    CellsExhausted,
    ChatError,
    DeadlineExceeded,
    Error,
    GrammarError,
    IntegrityError,
    LibraryNotBuilt,
    LoadCancelled,
    ModelLoadError,
    ModelNotFound,
    ModelUnloaded,
    OptionError,
    PromptError,
    PromptTooLong,
    QueueFull,
    SamplingError,
    SessionBusy,
    StateError,
    TemplateError,
    ToolCallError,
    Unsupported,
    VocabularyOnly,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterLoadError",
    "AdapterUnloaded",
    "AlreadyLoaded",
    "AsyncChatStream",
    "AsyncStream",
    "BackendError",
    "Buffer",
    "Cache",
    "CacheDelta",
    "CacheError",
    "CacheFormatError",
    "CacheHit",
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
    "Drafter",
    "Drafts",
    "EngineMetrics",
    "Error",
    "Event",
    "Grammar",
    "GrammarError",
    "IntegrityError",
    "LibraryNotBuilt",
    "LoadCancelled",
    "MemoryUsage",
    "Model",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFound",
    "ModelUnloaded",
    "NotedToken",
    "OptionError",
    "Policy",
    "Pressure",
    "PromptError",
    "PromptTooLong",
    "QueueFull",
    "SamplingError",
    "SamplingState",
    "SaveReason",
    "Score",
    "SessionBusy",
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
