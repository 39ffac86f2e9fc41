"""A request and what comes of it: options, events, the result. Plain immutable values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache import KEY_BYTES
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.output.phases import PhaseOptions
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.sampler import SamplingState, TokenLogprobs
from erllama.engine.speculation import Drafter, Drafts
from erllama.errors import OptionError, boolean, encodable, integer, real, shown

FinishReason = Literal["stop", "length", "context_full", "cancelled", "tool_calls"]
HitKind = Literal["cold", "partial", "exact"]

MOST_SPECULATIVE = 64  # beyond that, hardly a draft comes true
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
        stop: texts at which the reply ends; the first by position wins, and is not part of it. The text of a
            special token stops at that token, too.
        stop_token_ids: ids of tokens at which the reply ends, wherever they come; not part of its text.
        logprobs: how many of the most likely tokens to tell the probabilities of, beside those of the
            tokens drawn; None for none at all.
        session_id: keeps the context in its cells for the session's next request; a name.
        timeout: seconds from the call in which the reply must be done; None for any time.
        sampling_state: where the draws of another reply ended, to go on from there; None to begin anew.
        grammar: the language that the reply must be of; None for any text.
        grammar_triggers: texts, and ids of tokens, at the first of which the grammar begins, itself a part of it;
            none of them for a grammar that the whole reply must be of.
        speculative: makes, of a prompt, what drafts tokens to be computed ahead; None for nothing ahead. Without
            effect where memory cannot be cut.
        speculative_tokens: most tokens computed ahead at once.
        phases: how thinking and tool calls are told from the answer; None for a reply that is all text.
    """

    max_tokens: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    reproducible: bool = False
    cache_salt: str | None = None
    parent_key: bytes | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    session_id: str | None = None
    timeout: float | None = None
    sampling_state: SamplingState | None = None
    grammar: Grammar | None = None
    grammar_triggers: Sequence[str | int] = ()
    phases: PhaseOptions | None = None
    speculative: Callable[[NDArray[np.int32]], Drafter] | None = None
    speculative_tokens: int = 8

    def __post_init__(self) -> None:
        put = object.__setattr__
        key = self.parent_key
        if key is not None and (not isinstance(key, bytes) or len(key) != KEY_BYTES):
            raise OptionError(
                f"parent_key={shown(key)}; give the finish_key of a Completion, {KEY_BYTES} bytes, or None"
            )
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):
            raise OptionError(f"cache_salt={shown(self.cache_salt)}; give a text that is not empty, or None")
        if self.max_tokens is not None:
            put(self, "max_tokens", integer("max_tokens", self.max_tokens, 0))
        boolean("reproducible", self.reproducible)
        put(self, "stop", _stop_strings(self.stop))
        put(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.logprobs is not None:
            put(self, "logprobs", integer("logprobs", self.logprobs, 0, MOST_LOGPROBS))
        if self.session_id is not None and (not isinstance(self.session_id, str) or not self.session_id):
            raise OptionError(f"session_id={shown(self.session_id)}; give a text that is not empty, or None")
        if self.timeout is not None:
            put(self, "timeout", real("timeout", self.timeout, 0.0))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise OptionError(f"grammar={shown(self.grammar)}; give GBNF as text, or an erllama.Grammar, or None")
        put(self, "grammar_triggers", _triggers(self.grammar_triggers, self.grammar))
        most = integer("speculative_tokens", self.speculative_tokens, 1, MOST_SPECULATIVE)
        put(self, "speculative_tokens", most)
        if self.speculative is not None and not callable(self.speculative):
            raise OptionError(f"speculative={self.speculative!r:.80}; give a maker of drafters, or None")
        if self.speculative is not None and self.reproducible:
            raise OptionError("speculative computes tokens together, and reproducible one by one; leave one out")
        if self.phases is not None and self.phases.calls_only and self.grammar is not None:
            raise OptionError("a grammar for a reply that must be a tool call; leave one of them out")
        if self.sampling_state is not None:
            if not isinstance(self.sampling_state, SamplingState):
                raise OptionError(
                    f"sampling_state={shown(self.sampling_state)}; give the sampling_state of a Completion, or None"
                )
            if self.sampling.seed not in (None, self.sampling_state.seed):
                raise OptionError(
                    f"seed={self.sampling.seed} beside a sampling_state, which goes on with seed "
                    f"{self.sampling_state.seed}; leave one out"
                )


def _stop_strings(stop: object) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) and text for text in found):
        raise OptionError(f"stop={shown(stop)}; give a text, or a list of them, none of them empty")
    return tuple(encodable("stop", text) for text in found)


def _stop_token_ids(given: object) -> tuple[int, ...]:
    if given is None or isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise OptionError(f"stop_token_ids={given!r:.80}; give a list of token ids, or leave it out")
    return tuple(integer("each of stop_token_ids", token, 0) for token in given)


def _triggers(given: object, grammar: Grammar | None) -> tuple[str | int, ...]:
    found = (given,) if isinstance(given, str | int) else given
    if not isinstance(found, list | tuple) or not all(
        trigger if isinstance(trigger, str) else integer("each of grammar_triggers", trigger, 0) >= 0
        for trigger in found
    ):
        raise OptionError(f"grammar_triggers={shown(given)}; give texts, none of them empty, or ids of tokens")
    if found and grammar is None:
        raise OptionError("grammar_triggers without a grammar; give one, as grammar=, json_schema= or regex=")
    return tuple(
        encodable("grammar_triggers", trigger) if isinstance(trigger, str) else trigger for trigger in found
    )


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One completion to run.

    Attributes:
        prompt: ids, int32, shape (n,).
        options: what is asked.
        n_scored: of how many of the prompt's last tokens the log-probabilities are told; less than n. With
            max_tokens=0 and logprobs: the completion's are those tokens'.
    """

    prompt: NDArray[np.int32]
    options: RequestOptions
    n_scored: int = 0


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


class CacheDelta(NamedTuple):
    """What a request took from the cache, and what it left there, in tokens.

    Attributes:
        read: of the prompt, that were not computed.
        created: of prompt and reply, that are stored now and were not when it began.
    """

    read: int
    created: int


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
        text: the reply as text, without thinking and tool calls; bytes that are no UTF-8 appear as U+FFFD.
        tokens: ids of the reply, an end token not among them, those of a stop string and a stop token among them.
        context_tokens: ids of prompt and reply.
        finish_reason: "stop" at an end-of-generation token or a stop string, "length" at
            max_tokens, "context_full" when no cell was left, "cancelled"; in chats "tool_calls", for a call.
        finish_key: names the stored context of this reply; None when nothing was stored.
        cache: how much of the prompt was warm.
        drafts: what speculation did, where it was asked for.
        cache_delta: tokens of the context that the cache gave, and those that it got.
        seed: the seed the draws used.
        sampling_state: where the draws stand; a request for more that is given it draws what this one would have.
        timings: where the time went.
        stop_sequence: the stop string that ended it, or the text of the stop token; None where none did.
        stop_token: the token that ended it, of `stop_token_ids`, or of a stop string that is a special token's
            text; None where none did. It is the last of `tokens`, unless it ends generation by itself.
        logprobs: one for each of `tokens`, where asked for; else None.
        thinking: what it thought, where that is told apart.
        thinking_signature: HMAC-SHA256 of `thinking` where a key was given, else b""; None where it did not
            come to the end of a thought.
        raw_tool_calls: each call as it was written, from its opening marker to its closing one, special tokens
            written out; where they are told apart.
        tool_call_places: for each of these, how many characters of `text` the model wrote before it.
    """

    text: str
    tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    finish_reason: FinishReason
    finish_key: bytes | None
    cache: CacheHit
    cache_delta: CacheDelta
    seed: int
    sampling_state: SamplingState
    timings: Timings
    stop_sequence: str | None = None
    stop_token: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    thinking: str = ""
    thinking_signature: bytes | None = None
    drafts: Drafts | None = None
    raw_tool_calls: tuple[bytes, ...] = ()
    tool_call_places: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the reply's text.

    Attributes:
        text: what is complete, and is no part of a stop string.
        tokens: the ids since the last piece.
        logprobs: one for each of them, where asked for; else empty.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """A piece of what the model thinks; attributes as of TextDelta."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ThinkingEnd:
    """A thought is over.

    Attributes:
        signature: HMAC-SHA256 of all thinking of the reply, in UTF-8, with `thinking_signing_key`; b"" without.
    """

    signature: bytes


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call as it is written, markers and all; attributes as of TextDelta."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        id: names it; the tool's result is sent back with it.
        name: of the tool.
        arguments: by name, as in JSON.
    """

    id: str
    name: str
    arguments: dict[str, object]

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON, as OpenAI's clients have them."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """What was written as a tool call, or as several, is over.

    Attributes:
        full: the bytes that were sampled, from the opening marker to the closing one, special tokens written out.
        calls: what they call; in chats.
        error: why they call nothing; in chats.
    """

    full: bytes
    calls: tuple[ToolCall, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a stream."""

    completion: Completion


Delta = TextDelta | ThinkingDelta | ToolCallDelta
Event = Delta | ThinkingEnd | ToolCallEnd | Done
