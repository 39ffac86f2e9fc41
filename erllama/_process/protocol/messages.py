"""The messages between a model's process and its parent, as declared immutable types.

The parent sends a `Start`, then `FromParent` messages; the child answers `FromChild` messages. All are encoded with
msgpack. Nothing that is received is ever executed or unpickled.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from erllama._process.protocol.frames import ProtocolError
from erllama._process.protocol.wire_types import (
    ModelState,
    Update,
    WireError,
    WireGrammar,
    WireOptions,
    WireProgress,
    WireVocabulary,
)
from erllama.cache import CacheSpec
from erllama.engine import Limits, ModelFacts
from erllama.engine.embedding import EmbeddingLimits
from erllama.events.options import KvEvents

_T = TypeVar("_T")

# Both processes have this number, and the version of the library. It changes with the messages.
PROTOCOL = 2


class _Message(Struct, frozen=True, array_like=True, tag=True):
    """A message: an array that begins with the name of its type."""


# --- from the parent -------------------------------------------------------------------------------


class GgufModel(Struct, frozen=True, tag="gguf"):
    """A GGUF file: its path, `LlamaOptions` as JSON, and how it is fingerprinted."""

    path: bytes
    options: bytes
    fingerprint: str
    own_fingerprint: bytes | None


class CustomModel(Struct, frozen=True, tag="custom"):
    """A custom backend: the function that makes it, and the function's options as JSON."""

    module: str
    function: str
    options: bytes


class Start(_Message, frozen=True):
    """The first message to a child: which model to run, and how.

    Attributes:
        kv_events: where it publishes events; None for a model that publishes none.
        is_replacement: whether it replaces a process that has ended.
    """

    protocol: int
    version: str
    id: str
    model: GgufModel | CustomModel
    cache: CacheSpec
    policy: dict[str, int | None]
    sizes: tuple[int | None, int | None, int | None, int]
    warmup: bool
    log_levels: dict[str, int]
    python_path: tuple[str, ...]
    heartbeat_seconds: float
    kv_events: KvEvents | None = None
    is_replacement: bool = False


class Submit(_Message, frozen=True):
    """Run a request.

    Attributes:
        id: identifies it in later messages.
        prompt: int32, little-endian.
        adapters: their numbers and scales.
        progress: how far an earlier process came with its reply.
    """

    id: int
    prompt: bytes
    options: WireOptions
    n_scored: int
    streaming: bool
    adapters: tuple[tuple[int, float], ...]
    progress: WireProgress | None


class Cancel(_Message, frozen=True):
    """End a request early."""

    id: int


class Stop(_Message, frozen=True):
    """Unload the model, write what waits, and exit."""


class Call(Struct, frozen=True, array_like=True, tag=True):
    """A call that is answered with a `Returned`; `call` identifies it."""

    call: int


class EndSession(Call, frozen=True):
    session_id: str
    cache_salt: str | None


class Evict(Call, frozen=True):
    pass


class CheckAdapter(Call, frozen=True):
    path: str


class LoadAdapter(Call, frozen=True):
    number: int
    path: str
    digest: str


class FreeAdapter(Call, frozen=True):
    number: int


class OpenEmbedder(Call, frozen=True):
    pass


class Embed(Call, frozen=True):
    texts: tuple[bytes, ...]
    pooling: str


class Pair(Call, frozen=True):
    query: str
    document: str


class AbortEmbedder(Call, frozen=True):
    pass


class CloseEmbedder(Call, frozen=True):
    pass


class CompileGrammar(Call, frozen=True):
    grammar: WireGrammar


class Tokenize(Call, frozen=True):
    text: bytes
    add_special: bool
    parse_special: bool


class Detokenize(Call, frozen=True):
    tokens: bytes
    special: bool


class CachedPrefix(Call, frozen=True):
    namespace: bytes
    tokens: bytes


class StoredContext(Call, frozen=True):
    key: bytes
    namespace: bytes


class ReportCache(Call, frozen=True):
    pass


class FlushCache(Call, frozen=True):
    timeout: float | None


class EvictBytes(Call, frozen=True):
    n_bytes: int
    tiers: tuple[str, ...]


AnyCall = (
    EndSession
    | Evict
    | CheckAdapter
    | LoadAdapter
    | FreeAdapter
    | OpenEmbedder
    | Embed
    | Pair
    | AbortEmbedder
    | CloseEmbedder
    | CompileGrammar
    | Tokenize
    | Detokenize
    | CachedPrefix
    | StoredContext
    | ReportCache
    | FlushCache
    | EvictBytes
)
FromParent = Submit | Cancel | Stop | AnyCall

# --- from the child --------------------------------------------------------------------------------


class Loading(_Message, frozen=True):
    """How much of the model is loaded, 0.0 to 1.0. None for a sign of life alone."""

    fraction: float | None


class Started(_Message, frozen=True):
    """The model is loaded.

    Attributes:
        pid: the child.
        limits, facts: of its backend.
        namespace: JSON of the backend's namespace.
        recipe: of the backend.
        backend, description: the names of the backend's class and of the model.
        vocabulary: None for a GGUF file, whose vocabulary the parent reads.
        n_seq_max: requests that run at once.
        state: of the model.
    """

    pid: int
    limits: Limits
    facts: ModelFacts
    namespace: bytes
    recipe: bytes
    backend: str
    description: str
    vocabulary: WireVocabulary | None
    n_seq_max: int
    state: ModelState


class StartFailed(_Message, frozen=True):
    """The model cannot be loaded."""

    error: WireError


class Accepted(_Message, frozen=True):
    """A request was queued."""

    id: int
    state: ModelState


class Refused(_Message, frozen=True):
    """A request was not queued."""

    id: int
    error: WireError


class Updates(_Message, frozen=True):
    """What a tick added to requests. `state` is set if a request ended."""

    updates: tuple[Update, ...]
    phase: str
    pending: int
    running: int
    state: ModelState | None = None


class Heartbeat(_Message, frozen=True):
    """A sign of life, from a thread other than the model's, with the counters of the cache."""

    state: ModelState
    counters: dict[str, int | float]


class Returned(_Message, frozen=True):
    """The answer to a call.

    Attributes:
        call: the call.
        error: what it raised; None if it returned.
        flag, number: what it returned, if that is a bool or a number.
        arrays: arrays that it returned, with their shapes; float32 or int32, little-endian.
        limits: of an embedder.
        report: of a cache: `MemberReport.as_plain`.
        raw: bytes that it returned; None for none.
    """

    call: int
    error: WireError | None = None
    flag: bool = False
    number: int = 0
    arrays: tuple[tuple[bytes, tuple[int, ...]], ...] = ()
    limits: EmbeddingLimits | None = None
    report: dict[str, object] | None = None
    raw: bytes | None = None


class Stopped(_Message, frozen=True):
    """The model is unloaded, and the child exits."""


FromChild = Loading | Started | StartFailed | Accepted | Refused | Updates | Heartbeat | Returned | Stopped

_encoder = msgspec.msgpack.Encoder()
_start_decoder = msgspec.msgpack.Decoder(Start)
_parent_decoder = msgspec.msgpack.Decoder(FromParent)
_child_decoder = msgspec.msgpack.Decoder(FromChild)


def encode(message: Start | FromParent | FromChild) -> bytes:
    """Return the body of a message."""
    return _encoder.encode(message)


def decode_start(body: bytes) -> Start:
    """Return the first message of the parent.

    Raises:
        ProtocolError: the bytes are another message, or none. So do the other functions.
    """
    return _decode(_start_decoder, body)


def decode_from_parent(body: bytes) -> FromParent:
    """Return a message of the parent."""
    return _decode(_parent_decoder, body)


def decode_from_child(body: bytes) -> FromChild:
    """Return a message of the child."""
    return _decode(_child_decoder, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"the other process sent a message that cannot be read: {error}") from error
