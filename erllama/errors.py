"""The exceptions of this library, all derived from `Error`.

Imports no other module of the library, so every layer can raise them. A message names the wrong value, the limit it
broke and what to do about it.
"""

from __future__ import annotations


class Error(Exception):
    """Base class of all exceptions of erllama."""


class OptionError(Error, ValueError):
    """An option is unknown, has the wrong type or is out of range."""


class GrammarError(OptionError):
    """A grammar is invalid, or a reply cannot continue under it.

    Attributes:
        line, column: position of the error in the grammar's text, from 1; None if it has no single position.
    """

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column


class MissingPackage(Error, ImportError):  # noqa: N818
    """An optional package is not installed. The message has the pip command that installs it."""


class PromptError(Error, ValueError):
    """A prompt is empty, has the wrong type, or has token ids outside the vocabulary."""


class PromptTooLong(PromptError):  # noqa: N818
    """The prompt has more tokens than the context has cells.

    Attributes:
        n_tokens: tokens of the prompt; at least so many, if it was refused before all of it was tokenized.
        n_ctx: tokens that fit.
    """

    def __init__(self, message: str, *, n_tokens: int = 0, n_ctx: int = 0) -> None:
        super().__init__(message)
        self.n_tokens, self.n_ctx = n_tokens, n_ctx


class ChatError(Error, ValueError):
    """The messages or tools of a chat are invalid.

    Attributes:
        index: index of the invalid message, from 0; None if the error is not in one message.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class TemplateError(ChatError):
    """A chat template does not parse, rejects the conversation, or exceeds the limits of a template.

    Attributes:
        line: line of the template, from 1; None if it is unknown.
        exceeds_limit: whether it exceeds a limit.
    """

    def __init__(
        self, message: str, *, index: int | None = None, line: int | None = None, exceeds_limit: bool = False
    ) -> None:
        super().__init__(message, index=index)
        self.line, self.exceeds_limit = line, exceeds_limit


class ToolCallError(ChatError):
    """The text that a model wrote as a tool call is not a valid tool call."""


class LibraryNotBuilt(Error):  # noqa: N818
    """The binding of libllama is missing because the package was not built."""


class ModelLoadError(Error):
    """A model file cannot be loaded."""


class ModelNameError(ModelLoadError):
    """No model on this machine has the name, several begin with it, or the one that has it is incomplete.

    Attributes:
        candidates: names that could be meant.
    """

    def __init__(self, message: str, *, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class DownloadError(Error):
    """A model cannot be downloaded, or what was downloaded is wrong. No incomplete model has its name."""


class AdapterLoadError(Error):
    """An adapter file cannot be loaded, or does not fit the model."""


class AdapterUnloaded(Error):  # noqa: N818
    """The adapter was unloaded. Load it again to use it."""


class LoadCancelled(ModelLoadError):  # noqa: N818
    """The progress callback cancelled the load."""


class Unsupported(Error):  # noqa: N818
    """The model or its backend cannot do this: for example, an encoder cannot write a reply."""


class ModelNotFound(Error, LookupError):  # noqa: N818
    """No model is loaded under this id."""


class AlreadyLoaded(Error):  # noqa: N818
    """A model is already loaded under this id."""


class ModelUnloaded(Error):  # noqa: N818
    """The model was unloaded before the request ran, or while it ran."""


class MemoryLimitExceeded(Error):  # noqa: N818
    """A model does not fit the free memory, or the memory limit of a server. It was not loaded.

    Attributes:
        n_bytes: estimated memory that the model needs.
        limit: bytes that are free, or bytes for all models of the server.
        is_busy: whether it fits once other models of the server are idle.
    """

    def __init__(self, message: str, n_bytes: int = 0, limit: int = 0, is_busy: bool = False) -> None:
        super().__init__(message)
        self.n_bytes, self.limit, self.is_busy = n_bytes, limit, is_busy


class VocabularyOnly(Error):  # noqa: N818
    """The model was loaded with vocab_only=True and has no weights to compute with."""


class BackendError(Error):
    """A backend failed to decode, or to pack or restore state."""


class ServerLost(BackendError):  # noqa: N818
    """An RPC server, which has weights and KV of a model, cannot be reached. Retry when it is back."""


class StateError(BackendError):
    """A payload does not fit the backend's memory. The sequence that was to be restored is unchanged."""


class CellsExhausted(BackendError):  # noqa: N818
    """The context has too few free cells for a batch. No part of the batch was computed."""


class ModelFailed(Error):  # noqa: N818
    """The process of the model ended too often and is not started again. Unload the model, and load it again.

    In a fleet: a request reached no replica, several times in a row.
    """


class ModelMismatch(Error):  # noqa: N818
    """A replica of a fleet runs another model than the ingress has tokenized for, under the same name."""


class RequestCrashed(Error):  # noqa: N818
    """The request ran when the model's process or replica ended, twice in a row. It is not sent again."""


class QueueFull(Error):  # noqa: N818
    """The model's queue holds `max_pending` waiting requests. Retry later."""


class DeadlineExceeded(Error, TimeoutError):  # noqa: N818
    """A request did not finish within its `timeout`."""


class SessionBusy(Error):  # noqa: N818
    """A request of this session is running or waiting."""


class CalledFromModelThread(Error, RuntimeError):  # noqa: N818
    """A callback in the model thread made a call that waits for the model thread, which would deadlock."""


class EventsError(Error):
    """A model cannot publish its KV events: an address cannot be used."""


class SamplingError(Error):
    """The logits leave no token to sample."""


class CacheError(Error):
    """The cache cannot perform an operation. Requests never fail with this error."""


class CacheKeyError(CacheError):
    """The key of encrypted content is missing or wrong. The content stays as it is."""


class PinError(CacheError):
    """A prefix cannot be pinned, because its blocks could not be stored."""


class PinQuotaExceeded(PinError):  # noqa: N818
    """Pins would protect more bytes than they may.

    Attributes:
        n_bytes: bytes that all pins would protect.
        quota: bytes that they may protect.
    """

    def __init__(self, message: str, *, n_bytes: int = 0, quota: int = 0) -> None:
        super().__init__(message)
        self.n_bytes, self.quota = n_bytes, quota


class IntegrityError(CacheError):
    """The cache's records of its blocks contradict each other: a bug in erllama."""


class CacheFormatError(CacheError):
    """The bytes are not a valid .kvc file."""


class CacheVersionError(CacheFormatError):
    """A newer release wrote this .kvc file."""


class SignatureRefused(CacheFormatError):  # noqa: N818
    """An object of the remote tier is not signed with a key of the key file, so it is not used.

    Attributes:
        unknown_key: whether it is signed with another key. It may belong to others then, and is left where it is.
    """

    def __init__(self, message: str, *, unknown_key: bool = False) -> None:
        super().__init__(message)
        self.unknown_key = unknown_key


class RemoteError(CacheError):
    """The remote tier cannot be used now. The cache continues without it."""


class RemoteUnreachable(RemoteError):  # noqa: N818
    """The service of the remote tier does not answer, or not in time. The tier recovers by itself."""


class RemoteAccessError(RemoteError):
    """The service refuses this machine: a permission, the region, the credentials or the clock is wrong."""
