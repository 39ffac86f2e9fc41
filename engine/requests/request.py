"""A request, its options, its events and its result, as immutable values.

Callers make a `Request`; the engine returns events and a `Completion`. Options are checked when they are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache import KEY_BYTES
from erllama.checks import boolean, encodable, integer, real, shown
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.output.phase_options import PhaseOptions
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.sampler import SamplingState, TokenLogprobs
from erllama.engine.speculation import Drafter, Drafts
from erllama.errors import OptionError

if TYPE_CHECKING:
    from erllama.engine.requests.progress import ReplyProgress  # which imports this module

FinishReason = Literal["stop", "length", "context_full", "cancelled", "tool_calls"]
HitKind = Literal["cold", "partial", "exact"]

MAX_SPECULATIVE = 64  # beyond that, hardly any draft is accepted
MAX_LOGPROBS = 100  # as many as a person, or an evaluation, ever looks at; a row of them is built per token


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of one completion.

    Attributes:
        max_tokens: maximum number of tokens of the reply; None for as many as fit the context.
        sampling: how tokens are sampled.
        reproducible: reuse KV only where the reply is, bit for bit, that of a cold run. Reuses less of the cache:
            up to one micro-batch is computed again.
        cache_salt: shares cached KV only with requests of the same salt; None with requests without a salt.
        parent_key: the `finish_key` of the context that the prompt continues. If its save is in flight, the
            request waits for it.
        stop: texts at which the reply ends; the first by position wins, and is not part of the reply. The text of a
            special token stops at that token, too.
        stop_token_ids: ids of tokens at which the reply ends, in any phase; not part of its text.
        logprobs: how many of the most likely tokens to report the log-probabilities of, beside that of each sampled
            token; None to report none.
        session_id: a name. The context stays in its cells for the next request with the same name.
        timeout: seconds from the call in which the reply must be done; None for no limit.
        sampling_state: continues the random draws of another reply; None to start new ones.
        grammar: the language that the reply must match; None for any text.
        grammar_triggers: texts and token ids. The grammar begins at the first of them in the reply, which is a part
            of it. Empty for a grammar that the whole reply must match.
        speculative: called with a prompt, returns the drafter of tokens to compute ahead; None to compute none.
            Without effect where memory cannot be cut.
        speculative_tokens: maximum number of tokens computed ahead at once.
        phases: how thinking and tool calls are separated from the answer; None for a reply that is all text.
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
                f"parent_key={shown(key)}; pass the finish_key of a Completion, {KEY_BYTES} bytes, or None"
            )
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):
            raise OptionError(f"cache_salt={shown(self.cache_salt)}; pass a text that is not empty, or None")
        if self.max_tokens is not None:
            put(self, "max_tokens", integer("max_tokens", self.max_tokens, 0))
        boolean("reproducible", self.reproducible)
        put(self, "stop", _stop_strings(self.stop))
        put(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.logprobs is not None:
            put(self, "logprobs", integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        if self.session_id is not None and (not isinstance(self.session_id, str) or not self.session_id):
            raise OptionError(f"session_id={shown(self.session_id)}; pass a text that is not empty, or None")
        if self.timeout is not None:
            put(self, "timeout", real("timeout", self.timeout, 0.0))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise OptionError(f"grammar={shown(self.grammar)}; pass GBNF as text, or an erllama.Grammar, or None")
        put(self, "grammar_triggers", _triggers(self.grammar_triggers, self.grammar))
        n_tokens = integer("speculative_tokens", self.speculative_tokens, 1, MAX_SPECULATIVE)
        put(self, "speculative_tokens", n_tokens)
        if self.speculative is not None and not callable(self.speculative):
            raise OptionError(
                f"speculative={self.speculative!r:.80}; pass a function that makes a drafter, or None"
            )
        if self.sampling_state is not None and not isinstance(self.sampling_state, SamplingState):
            raise OptionError(
                f"sampling_state={shown(self.sampling_state)}; pass the sampling_state of a Completion, or None"
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raise OptionError for options that exclude each other."""
        if self.speculative is not None and self.reproducible:
            raise OptionError(
                "speculative computes tokens together, and reproducible one by one; leave one of them out"
            )
        if self.phases is not None and self.phases.calls_only and self.grammar is not None:
            raise OptionError("grammar beside a tool choice that requires a call; leave one of them out")
        state, seed = self.sampling_state, self.sampling.seed
        if state is not None and seed not in (None, state.seed):
            raise OptionError(
                f"seed={seed} beside a sampling_state, which continues with seed {state.seed}; leave one out"
            )


def _stop_strings(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise OptionError(f"stop={shown(stop)}; pass a text, or a list of them, none of them empty")
    return tuple(encodable("stop", text) for text in texts)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None or isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise OptionError(f"stop_token_ids={value!r:.80}; pass a list of token ids, or leave it out")
    return tuple(integer("each of stop_token_ids", token, 0) for token in value)


def _triggers(value: object, grammar: Grammar | None) -> tuple[str | int, ...]:
    triggers = (value,) if isinstance(value, str | int) else value
    if not isinstance(triggers, list | tuple) or not all(
        trigger if isinstance(trigger, str) else integer("each of grammar_triggers", trigger, 0) >= 0
        for trigger in triggers
    ):
        raise OptionError(f"grammar_triggers={shown(value)}; pass texts, none of them empty, or ids of tokens")
    if triggers and grammar is None:
        raise OptionError("grammar_triggers without a grammar; pass one, as grammar=, json_schema= or regex=")
    return tuple(
        encodable("grammar_triggers", trigger) if isinstance(trigger, str) else trigger for trigger in triggers
    )


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One completion to run.

    Attributes:
        prompt: ids, int32, shape (n,).
        options: its options.
        n_scored: how many of the prompt's last tokens to score; less than n. With max_tokens=0 and logprobs: the
            completion's log-probabilities are those of these tokens.
        resumed: how far the reply came in another process, which this request continues; None for a new one. A
            request that scores its prompt has no reply and starts again.
    """

    prompt: NDArray[np.int32]
    options: RequestOptions
    n_scored: int = 0
    resumed: ReplyProgress | None = None


@dataclass(frozen=True, slots=True)
class CacheHit:
    """How much of a prompt was reused.

    Attributes:
        kind: "exact" if all of it was (the last token is always computed, for its logits), "partial" if a part
            was, "cold" if none was.
        tier: the slowest tier that a part was read from; None for a cold one.
        tokens: prompt tokens that were not computed again.
    """

    kind: HitKind
    tier: str | None
    tokens: int


class CacheDelta(NamedTuple):
    """The tokens that a request read from the cache, and those that it added.

    Attributes:
        read: prompt tokens that were not computed.
        created: tokens of prompt and reply that are stored now and were not when the request began.
    """

    read: int
    created: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds, and the tokens computed in it.

    If the process of the model was replaced meanwhile, only the time and the tokens since then count.

    Attributes:
        queued: waiting for the model.
        restore: looking up and restoring from the cache.
        prefill: computing the rest of the prompt, up to the first token.
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
        """Seconds from the start of the work to its end, without `queued`."""
        return self.restore + self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply.

    Attributes:
        text: the reply as text, without thinking and tool calls; bytes that are not UTF-8 appear as U+FFFD.
        tokens: ids of the reply, without an end-of-generation token, with the tokens of a stop string and a stop
            token.
        context_tokens: ids of prompt and reply.
        finish_reason: "stop" at an end-of-generation token or a stop string, "length" at max_tokens,
            "context_full" if no cell was left, "cancelled"; in chats "tool_calls", for a call.
        finish_key: names the stored context of this reply; None if it is not stored.
        cache: how much of the prompt was reused.
        drafts: the results of speculation, if it was requested.
        cache_delta: tokens read from the cache, and tokens added to it.
        seed: the seed of the random draws.
        sampling_state: the state of the random draws. A request that continues this one with it samples what this
            one would have sampled.
        timings: where the time went.
        stop_sequence: the stop string that ended the reply, or the text of the stop token; None if neither did.
        stop_token: the token that ended the reply, of `stop_token_ids`, or of a stop string that is a special
            token's text; None if none did. It is the last of `tokens`, unless it ends generation by itself.
        logprobs: one for each of `tokens`, if requested; else None.
        thinking: the thinking, if the phases are separated.
        thinking_signature: HMAC-SHA256 of `thinking` with `thinking_signing_key`; b"" without a key; None if no
            thought ended.
        raw_tool_calls: each call as the model wrote it, from its opening marker to its closing one, special tokens
            spelled out; if the phases are separated.
        tool_call_places: for each of these, the number of characters of `text` before it.
        restarts: how many times the process of the model was replaced during the request.
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
    restarts: int = 0

    @property
    def n_prompt(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.context_tokens) - len(self.tokens)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the reply's text.

    Attributes:
        text: text that is complete and is not part of a stop string.
        tokens: the ids since the last piece.
        logprobs: one for each of them, if requested; else empty.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """A piece of the thinking. Attributes as in TextDelta."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ThinkingEnd:
    """The end of a thought.

    Attributes:
        signature: HMAC-SHA256 of all thinking of the reply, in UTF-8, with `thinking_signing_key`; b"" without one.
    """

    signature: bytes


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call as the model writes it, with its markers. Attributes as in TextDelta."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        id: identifies the call; the tool's result refers to it.
        name: the tool's name.
        arguments: the arguments by name, as in JSON.
    """

    id: str
    name: str
    arguments: dict[str, object]

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON, as in OpenAI's API."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The end of a tool call, or of several that the model wrote as one.

    Attributes:
        full: the bytes that were sampled, from the opening marker to the closing one, special tokens spelled out.
        calls: the calls; in chats.
        error: why the text is not a tool call; in chats.
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
