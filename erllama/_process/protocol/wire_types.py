"""Requests, replies, state and errors as parts of messages: declared immutable types.

`wire_values` converts between them and the engine's types.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct


class WireError(Struct, frozen=True, array_like=True):
    """An error: the name of its class in `erllama.errors`, its message, and its attributes."""

    kind: str
    message: str
    line: int | None = None
    column: int | None = None


class WireSamplingState(Struct, frozen=True, array_like=True):
    """A `SamplingState`. The generator's numbers have 128 bits, so they are bytes."""

    seed: int
    state: bytes
    increment: bytes
    has_uint32: int
    uinteger: int
    mu: float | None


class WireGrammar(Struct, frozen=True, array_like=True):
    """A `Grammar`, by its source."""

    kind: str
    source: str
    root: str


class WireMarkers(Struct, frozen=True, array_like=True):
    """`Markers` of a phase."""

    open: tuple[str, ...]
    close: tuple[str, ...]


class WirePhases(Struct, frozen=True):
    """`PhaseOptions`; attributes as there."""

    thinking: WireMarkers | None
    calls: WireMarkers | None
    payload: WireMarkers | None
    quotes: tuple[str, ...]
    leading: tuple[str, ...]
    skip: tuple[str, ...]
    call_grammar: WireGrammar | None
    calls_only: bool
    starts_in_thinking: bool | None
    open_marker: str
    thinking_budget: int | None
    budget_message: str
    signing_key: bytes | None


class WireOptions(Struct, frozen=True, omit_defaults=True):
    """`RequestOptions`. `sampling` has the options of the sampler's steps that differ from their defaults.

    Attributes beyond those: `drafter` is None, "ngram", or the tokens that are proposed for a prompt.
    """

    max_tokens: int | None = None
    sampling: dict[str, int | float | str | bool | tuple[str, ...]] = {}
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    banned_tokens: tuple[int, ...] = ()
    samplers: tuple[str, ...] | None = None
    reproducible: bool = False
    cache_salt: str | None = None
    parent_key: bytes | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    session_id: str | None = None
    timeout: float | None = None
    sampling_state: WireSamplingState | None = None
    grammar: WireGrammar | None = None
    grammar_triggers: tuple[str | int, ...] = ()
    phases: WirePhases | None = None
    drafter: str | tuple[int, ...] | None = None
    speculative_tokens: int = 8


class WireHit(Struct, frozen=True, array_like=True):
    """A `CacheHit`."""

    kind: str
    tier: str | None
    tokens: int


class WireLogprobs(Struct, frozen=True, array_like=True):
    """`TokenLogprobs`."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class WireProgress(Struct, frozen=True, array_like=True):
    """A `ReplyProgress`; in an `Update`, only what is new. `state` is None if it did not change."""

    tokens: tuple[int, ...]
    logprobs: tuple[WireLogprobs, ...]
    state: WireSamplingState | None
    queued: tuple[int, ...]
    hit: WireHit | None
    thinking_ended: bool
    stored: tuple[int, int]


class WireDelta(Struct, frozen=True, array_like=True, tag="d"):
    """A `DeltaPiece`."""

    kind: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[WireLogprobs, ...]


class WireEnd(Struct, frozen=True, array_like=True, tag="e"):
    """An `EndPiece`."""

    kind: str
    raw: bytes


class WireTokens(Struct, frozen=True, array_like=True, tag="t"):
    """`TextTokens`."""

    tokens: tuple[int, ...]
    is_last: bool


WirePiece = int | WireDelta | WireEnd | WireTokens


class WireCompletion(Struct, frozen=True):
    """A `Completion` without its prompt, which the parent has. `tokens` are int32, little-endian."""

    text: str
    tokens: bytes
    finish_reason: str
    finish_key: bytes | None
    cache: WireHit
    read: int
    created: int
    state: WireSamplingState
    timings: tuple[float, float, float, float, int, int]
    stop_sequence: str | None
    stop_token: int | None
    logprobs: tuple[WireLogprobs, ...] | None
    thinking: str
    thinking_signature: bytes | None
    drafts: tuple[int, int] | None
    raw_tool_calls: tuple[bytes, ...]
    tool_call_places: tuple[int, ...]


class Update(Struct, frozen=True, array_like=True):
    """What a tick added to one request.

    Attributes:
        id: the request.
        progress: its new tokens and its state; None at the end of one without new tokens.
        pieces: of its reply, for the reader; None if they are the tokens of `progress`.
        completion, error: its end.
    """

    id: int
    progress: WireProgress | None = None
    pieces: tuple[WirePiece, ...] | None = None
    completion: WireCompletion | None = None
    error: WireError | None = None


class WireMetrics(Struct, frozen=True, array_like=True):
    """`EngineMetrics`: the counts by reason and error, the plain counts in order, and the two histograms."""

    finished: dict[str, int]
    failed: dict[str, int]
    counts: tuple[int, ...]
    first_token: tuple[tuple[int, ...], float]
    between_tokens: tuple[tuple[int, ...], float]


class ModelState(Struct, frozen=True):
    """What a model does, and how it is.

    Attributes:
        phase, pending, running: as the attributes of a runner.
        metrics: since the process started.
        cache_problem: as the attribute of a runner.
        n_threads, n_threads_batch, threads_reason: as in `ModelFacts`.
        tick_seconds: how long the present tick has been running; 0.0 between two ticks.
        expected_seconds: how long it should take, by the measured times of earlier ones.
    """

    phase: str
    pending: int
    running: int
    metrics: WireMetrics
    cache_problem: str
    n_threads: int
    n_threads_batch: int
    threads_reason: str
    tick_seconds: float = 0.0
    expected_seconds: float = 0.0

    def moved(self, phase: str, pending: int, running: int) -> ModelState:
        """Return the state with what the model does now."""
        if (phase, pending, running) == (self.phase, self.pending, self.running):
            return self
        return msgspec.structs.replace(self, phase=phase, pending=pending, running=running)


class WireVocabulary(Struct, frozen=True):
    """A vocabulary that only the child has: the bytes of every token, and which tokens end generation."""

    pieces: tuple[bytes, ...]
    eog: tuple[int, ...]
    longest_piece: int
    infill: tuple[tuple[int, ...], int, int, int] | None
