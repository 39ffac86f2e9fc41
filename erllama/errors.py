"""Every error this library raises on purpose, under one root.

A leaf module: it imports nothing of ours, so that every layer may use it. The
message of an error names the value, the limit and the way out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches


class Error(Exception):
    """Root of everything raised by erllama."""


class OptionError(Error, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class GrammarError(OptionError):
    """A grammar that cannot be used, or a reply that cannot go on under one.

    Attributes:
        line, column: where in its text, from 1; None where there is no one place.
    """

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column


class PromptError(Error, ValueError):
    """A prompt that cannot be run: empty, or with token ids outside the vocabulary."""


class PromptTooLong(PromptError):  # noqa: N818 - reads as what happened
    """The prompt has more tokens than the context has cells."""


class ChatError(Error, ValueError):
    """A conversation, or its tools, that no chat can be made of.

    Attributes:
        index: of the message at fault, from 0; None where it is none's.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class TemplateError(ChatError):
    """A chat template does not parse, refuses the conversation, or asks for more than a template may.

    Attributes:
        line: of the template, from 1; None where it is not known.
    """

    def __init__(self, message: str, *, index: int | None = None, line: int | None = None) -> None:
        super().__init__(message, index=index)
        self.line = line


class ToolCallError(ChatError):
    """What a model wrote as a tool call is none."""


class LibraryNotBuilt(Error):  # noqa: N818
    """The binding of libllama is missing: the package was not built."""


class ModelLoadError(Error):
    """A model file cannot be loaded."""


class AdapterLoadError(Error):
    """An adapter file cannot be loaded, or is not for this model."""


class AdapterUnloaded(Error):  # noqa: N818
    """The adapter was unloaded; load it again to use it."""


class LoadCancelled(ModelLoadError):  # noqa: N818
    """A load was cancelled by its progress callback."""


class Unsupported(Error):  # noqa: N818
    """What was asked for is beyond this model, or its backend: a reply of one that only encodes, for example."""


class ModelNotFound(Error, LookupError):  # noqa: N818
    """No model is loaded under this id."""


class AlreadyLoaded(Error):  # noqa: N818
    """A model is already loaded under this id."""


class ModelUnloaded(Error):  # noqa: N818
    """The model was unloaded; the request was not run, or not to its end."""


class VocabularyOnly(Error):  # noqa: N818
    """The model was loaded with vocab_only=True: it has no weights to compute with."""


class BackendError(Error):
    """A backend could not decode, or could not pack or restore state."""


class StateError(BackendError):
    """A payload does not fit the backend's memory; the sequence it was for is as it was."""


class CellsExhausted(BackendError):  # noqa: N818
    """No free cells for a batch; nothing of it was computed."""


class QueueFull(Error):  # noqa: N818
    """As many requests wait for the model as may; ask again later."""


class DeadlineExceeded(Error, TimeoutError):  # noqa: N818
    """A request was not done within its `timeout`."""


class SessionBusy(Error):  # noqa: N818
    """A request of this session is running or waiting."""


class CalledFromModelThread(Error, RuntimeError):  # noqa: N818
    """A call that waits for the model was made by the model's own thread, which would wait for itself."""


class SamplingError(Error):
    """The logits leave nothing to sample from."""


class CacheError(Error):
    """The cache cannot do what was asked of it. Requests never fail with it."""


class IntegrityError(CacheError):
    """What the cache knows of its blocks contradicts itself: a defect of ours."""


class CacheFormatError(CacheError):
    """Bytes that are no valid .kvc file."""


class CacheVersionError(CacheFormatError):
    """A .kvc file of a release newer than this one."""


def shown(value: object) -> str:
    """A value for an error's message, not too long; its type where it cannot be written."""
    try:
        text = repr(value)
    except Exception:  # nested too deeply, an integer of too many digits, or a faulty __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def reject_unknown(given: Mapping[str, object], known: Collection[str], where: str) -> None:
    """Raise OptionError for the first name in `given`; suggest the nearest of `known`."""
    for name in given:
        near = _nearest(name, known)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known))}"
        raise OptionError(f"{where} has no option {name!r}; {hint}")


def integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """`value` as an int within limits, or OptionError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise OptionError(f"{name} must be an integer, not {shown(value)}")
    try:
        number = int(value.__index__())
    except TypeError:
        raise OptionError(f"{name} must be an integer, not {shown(value)}") from None
    _within(name, number, minimum, maximum)
    return number


def real(name: str, value: object, minimum: float | None = None, maximum: float | None = None) -> float:
    """`value` as a finite float within limits, or OptionError."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise OptionError(f"{name} must be a number, not {shown(value)}")
    try:
        number = float(value.__float__())
    except (OverflowError, TypeError, ValueError):
        raise OptionError(f"{name} must be a finite number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise OptionError(f"{name} must be finite, not {shown(value)}")
    _within(name, number, minimum, maximum)
    return number


def boolean(name: str, value: object) -> bool:
    """`value` if it is True or False, or OptionError."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {shown(value)}")
    return value


def encodable(name: str, value: str) -> str:
    """`value` if it is whole characters, or OptionError."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{name}: {shown(value)} has half a surrogate pair, which is no text") from None
    return value


def choice(name: str, value: object, known: Collection[str]) -> str:
    """`value` if it is one of `known`, or OptionError with the nearest."""
    if not isinstance(value, str) or value not in known:
        near = _nearest(value if isinstance(value, str) else "", known)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"{name}={shown(value)}; it takes {', '.join(map(repr, known))}{hint}")
    return value


def _nearest(name: str, known: Collection[str]) -> list[str]:
    # Stricter than the default, which takes "top_p" for a misspelt "stop".
    return get_close_matches(name, known, n=1, cutoff=0.7)


def _within(name: str, number: float, minimum: float | None, maximum: float | None) -> None:
    if minimum is not None and number < minimum:
        raise OptionError(f"{name}={shown(number)}; it must be at least {minimum}")
    if maximum is not None and number > maximum:
        raise OptionError(f"{name}={shown(number)}; it must be at most {maximum}")
