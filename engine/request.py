"""A request and what comes of it: options, events, the result. Plain immutable values.

`Ticket` is the one exception: the caller's end of a request in flight.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from erllama.cache import KEY_BYTES
from erllama.engine.sampling import SamplingOptions
from erllama.errors import OptionError, boolean, integer

FinishReason = Literal["stop", "length", "context_full", "cancelled"]
HitKind = Literal["cold", "partial", "exact"]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a caller may ask of one completion.

    Attributes:
        max_tokens: most tokens of the reply; None for as many as the context holds.
        sampling: how tokens are drawn.
        reproducible: resume only where the reply is, bit for bit, that of a
            cold run. Costs some warmth: up to one micro-batch is computed again.
        cache_salt: shares cached KV only with requests of the same salt; None with those of none.
        parent_key: the `finish_key` of the context that the prompt goes on from: where its save is
            still in flight, that is waited for.
    """

    max_tokens: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    reproducible: bool = False
    cache_salt: str | None = None
    parent_key: bytes | None = None

    def __post_init__(self) -> None:
        key = self.parent_key
        if key is not None and (not isinstance(key, bytes) or len(key) != KEY_BYTES):
            raise OptionError(
                f"parent_key={key!r}; give the finish_key of a Completion, {KEY_BYTES} bytes, or None"
            )
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):
            raise OptionError(f"cache_salt={self.cache_salt!r}; give a text that is not empty, or None")
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", integer("max_tokens", self.max_tokens, 0))
        boolean("reproducible", self.reproducible)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One completion to run: prompt ids, int32, shape (n,), and options."""

    prompt: NDArray[np.int32]
    options: RequestOptions


@dataclass(frozen=True, slots=True)
class CacheHit:
    """How much of a prompt was warm.

    Attributes:
        kind: "exact" when all of it was (the last token is always computed,
            for its logits), "partial" when some was, "cold" when none was.
        tier: the slowest tier that gave some of it; None for a cold one.
        tokens: prompt tokens that were not computed again.
    """

    kind: HitKind
    tier: str | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent, and the tokens it spent them on.

    Attributes:
        queued: waiting for the model.
        restore: looking up and restoring from the cache.
        prefill: computing the rest of the prompt, to the first token.
        decode: computing the reply after its first token.
        prefill_tokens: prompt tokens computed.
        decode_tokens: reply tokens after the first.
    """

    queued: float
    restore: float
    prefill: float
    decode: float
    prefill_tokens: int
    decode_tokens: int

    @property
    def total(self) -> float:
        """From the start of the work to its end, without the wait."""
        return self.restore + self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply.

    Attributes:
        text: the reply as text; bytes that are no UTF-8 appear as U+FFFD.
        tokens: ids of the reply, an end token not among them.
        context_tokens: ids of prompt and reply.
        finish_reason: "stop" at an end-of-generation token, "length" at
            max_tokens, "context_full" when no cell was left, "cancelled".
        finish_key: names the stored context of this reply; None when nothing was stored.
        cache: how much of the prompt was warm.
        seed: the seed the draws used.
        timings: where the time went.
    """

    text: str
    tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    finish_reason: FinishReason
    finish_key: bytes | None
    cache: CacheHit
    seed: int
    timings: Timings


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the reply: text that is complete, and the tokens since the last piece."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a stream."""

    completion: Completion


Event = TextDelta | Done


class Ticket:
    """The caller's end of a request in flight; the model thread fills it.

    Safe from any thread. Events come in order and end with `Done` or an error.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._condition = threading.Condition()
        self._events: deque[Event] = deque()
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._cancelled = False

    # --- the model thread's side

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def emit(self, event: TextDelta) -> None:
        with self._condition:
            self._events.append(event)
            self._condition.notify_all()

    def finish(self, completion: Completion) -> None:
        with self._condition:
            self._completion = completion
            self._events.append(Done(completion))
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._condition:
            self._error = error
            self._condition.notify_all()

    # --- the caller's side

    @property
    def done(self) -> bool:
        return self._completion is not None or self._error is not None

    def cancel(self) -> None:
        """Ask for an early end; the request still ends with a Completion. Idempotent."""
        self._cancelled = True

    def events(self) -> Iterator[Event]:
        """Events as they come; raises the request's error where it failed."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._events or self._error is not None)
                if not self._events:
                    assert self._error is not None
                    raise self._error
                event = self._events.popleft()
            yield event
            if isinstance(event, Done):
                return

    def result(self) -> Completion:
        """Wait for the end; raises the request's error where it failed."""
        with self._condition:
            self._condition.wait_for(lambda: self.done)
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion
