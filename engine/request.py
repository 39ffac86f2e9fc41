"""A request and what comes of it: options, events, the result. Plain immutable values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from erllama.cache import KEY_BYTES
from erllama.engine.grammar import Grammar
from erllama.engine.sampling import SamplingOptions, SamplingState, TokenLogprobs
from erllama.errors import OptionError, boolean, integer, real

FinishReason = Literal["stop", "length", "context_full", "cancelled"]
HitKind = Literal["cold", "partial", "exact"]

MOST_LOGPROBS = 100  # as many as a person, or an evaluation, ever looks at; a row of them is built per token


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
        stop: texts at which the reply ends; the first by position wins, and is not part of it.
        logprobs: how many of the most likely tokens to tell the probabilities of, beside those of the
            tokens drawn; None for none at all.
        session_id: keeps the context in its cells for the session's next request; a name.
        timeout: seconds from the call in which the reply must be done; None for any time.
        sampling_state: where the draws of another reply ended, to go on from there; None to begin anew.
        grammar: the language that the reply must be of; None for any text.
        grammar_triggers: texts, and ids of tokens, at the first of which the grammar begins, itself a part of it;
            none of them for a grammar that the whole reply must be of.
    """

    max_tokens: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    reproducible: bool = False
    cache_salt: str | None = None
    parent_key: bytes | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    session_id: str | None = None
    timeout: float | None = None
    sampling_state: SamplingState | None = None
    grammar: Grammar | None = None
    grammar_triggers: Sequence[str | int] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        key = self.parent_key
        if key is not None and (not isinstance(key, bytes) or len(key) != KEY_BYTES):
            raise OptionError(
                f"parent_key={key!r}; give the finish_key of a Completion, {KEY_BYTES} bytes, or None"
            )
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):
            raise OptionError(f"cache_salt={self.cache_salt!r}; give a text that is not empty, or None")
        if self.max_tokens is not None:
            put(self, "max_tokens", integer("max_tokens", self.max_tokens, 0))
        boolean("reproducible", self.reproducible)
        put(self, "stop", _stop_strings(self.stop))
        if self.logprobs is not None:
            put(self, "logprobs", integer("logprobs", self.logprobs, 0, MOST_LOGPROBS))
        if self.session_id is not None and (not isinstance(self.session_id, str) or not self.session_id):
            raise OptionError(f"session_id={self.session_id!r}; give a text that is not empty, or None")
        if self.timeout is not None:
            put(self, "timeout", real("timeout", self.timeout, 0.0))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise OptionError(f"grammar={self.grammar!r}; give GBNF as text, or an erllama.Grammar, or None")
        put(self, "grammar_triggers", _triggers(self.grammar_triggers, self.grammar))
        if self.sampling_state is not None:
            if not isinstance(self.sampling_state, SamplingState):
                raise OptionError(
                    f"sampling_state={self.sampling_state!r}; give the sampling_state of a Completion, or None"
                )
            if self.sampling.seed not in (None, self.sampling_state.seed):
                raise OptionError(
                    f"seed={self.sampling.seed} beside a sampling_state, which goes on with seed "
                    f"{self.sampling_state.seed}; leave one out"
                )


def _stop_strings(stop: object) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) and text for text in found):
        raise OptionError(f"stop={stop!r}; give a text, or a list of them, none of them empty")
    return tuple(found)


def _triggers(given: object, grammar: Grammar | None) -> tuple[str | int, ...]:
    found = (given,) if isinstance(given, str | int) else given
    if not isinstance(found, list | tuple) or not all(
        trigger if isinstance(trigger, str) else integer("each of grammar_triggers", trigger, 0) >= 0
        for trigger in found
    ):
        raise OptionError(f"grammar_triggers={given!r}; give texts, none of them empty, or ids of tokens")
    if found and grammar is None:
        raise OptionError("grammar_triggers without a grammar; give one, as grammar=, json_schema= or regex=")
    return tuple(found)


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
        decode: from the first token of the reply to its last.
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
        tokens: ids of the reply, an end token not among them, those of a stop string among them.
        context_tokens: ids of prompt and reply.
        finish_reason: "stop" at an end-of-generation token or a stop string, "length" at
            max_tokens, "context_full" when no cell was left, "cancelled".
        finish_key: names the stored context of this reply; None when nothing was stored.
        cache: how much of the prompt was warm.
        seed: the seed the draws used.
        sampling_state: where the draws stand; a request for more that is given it draws what this one would have.
        timings: where the time went.
        stop_sequence: the stop string that ended it; None where none did.
        logprobs: one for each of `tokens`, where asked for; else None.
    """

    text: str
    tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    finish_reason: FinishReason
    finish_key: bytes | None
    cache: CacheHit
    seed: int
    sampling_state: SamplingState
    timings: Timings
    stop_sequence: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the reply.

    Attributes:
        text: what is complete, and is no part of a stop string.
        tokens: the ids since the last piece.
        logprobs: one for each of them, where asked for; else empty.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a stream."""

    completion: Completion


Event = TextDelta | Done
