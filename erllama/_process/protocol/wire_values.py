"""The conversion of requests, replies and errors to the values of messages, and back.

Values that cannot cross a process, such as functions, are refused by name, with what to do instead.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from erllama import errors
from erllama._process.protocol.wire_types import (
    WireCompletion,
    WireDelta,
    WireEnd,
    WireError,
    WireGrammar,
    WireHit,
    WireLogprobs,
    WireMarkers,
    WireMetrics,
    WireOptions,
    WirePhases,
    WirePiece,
    WireProgress,
    WireSamplingState,
    WireTokens,
)
from erllama.checks import shown
from erllama.engine import CacheDelta, CacheHit, Completion, EngineMetrics, Grammar, RequestOptions, SamplingOptions
from erllama.engine.metrics import Histogram
from erllama.engine.output.phase_options import Markers, PhaseOptions
from erllama.engine.requests.progress import ReplyProgress
from erllama.engine.requests.request import FinishReason, HitKind, Timings
from erllama.engine.requests.ticket import DeltaPiece, EndPiece, Piece, TextTokens
from erllama.engine.sampling.options import DECLARED, SAMPLERS
from erllama.engine.sampling.sampler import SamplingState, TokenLogprobs
from erllama.engine.speculation import Drafts, NgramDrafter, ProposedTokens
from erllama.errors import OptionError

_GENERATOR_BYTES = 16
_COUNTS = (
    *("refused", "prompt_tokens", "shared_tokens", "cached_tokens", "prefilled_tokens", "decoded_tokens"),
    *("drafted_tokens", "accepted_tokens", "drafts", "ticks", "preempted"),
)

# --- options ---------------------------------------------------------------------------------------


def pack_options(options: RequestOptions, timeout: float | None) -> WireOptions:
    """Return options for a message.

    Args:
        timeout: the seconds that are left; None for no limit.

    Raises:
        OptionError: a value is a function, which cannot run in another process.
    """
    sampling = options.sampling
    for step in sampling.samplers:
        if not isinstance(step, str):
            raise _cannot_cross("samplers", step, "use the names of steps")
    biases = sampling.logit_bias
    return WireOptions(
        max_tokens=options.max_tokens,
        sampling={
            name: value for name, option in DECLARED.items() if (value := getattr(sampling, name)) != option.default
        },
        seed=sampling.seed,
        logit_bias=None if biases is None else tuple(biases.items()),
        banned_tokens=tuple(sampling.banned_tokens),
        samplers=None if sampling.samplers == SAMPLERS else cast("tuple[str, ...]", tuple(sampling.samplers)),
        reproducible=options.reproducible,
        cache_salt=options.cache_salt,
        parent_key=options.parent_key,
        stop=tuple(options.stop),
        stop_token_ids=tuple(options.stop_token_ids),
        logprobs=options.logprobs,
        session_id=options.session_id,
        timeout=timeout,
        sampling_state=None if options.sampling_state is None else pack_state(options.sampling_state),
        grammar=_pack_grammar(options.grammar),
        grammar_triggers=tuple(options.grammar_triggers),
        phases=_pack_phases(options.phases),
        drafter=_pack_drafter(options.speculative),
        speculative_tokens=options.speculative_tokens,
    )


def unpack_options(wire: WireOptions) -> RequestOptions:
    """Return the options of a message; they are checked again."""
    sampling: dict[str, object] = dict(wire.sampling)
    return RequestOptions(
        max_tokens=wire.max_tokens,
        sampling=SamplingOptions(
            **sampling,  # type: ignore[arg-type]
            seed=wire.seed,
            logit_bias=None if wire.logit_bias is None else dict(wire.logit_bias),
            banned_tokens=wire.banned_tokens,
            samplers=SAMPLERS if wire.samplers is None else wire.samplers,
        ),
        reproducible=wire.reproducible,
        cache_salt=wire.cache_salt,
        parent_key=wire.parent_key,
        stop=wire.stop,
        stop_token_ids=wire.stop_token_ids,
        logprobs=wire.logprobs,
        session_id=wire.session_id,
        timeout=wire.timeout,
        sampling_state=None if wire.sampling_state is None else unpack_state(wire.sampling_state),
        grammar=_unpack_grammar(wire.grammar),
        grammar_triggers=wire.grammar_triggers,
        phases=_unpack_phases(wire.phases),
        speculative=_unpack_drafter(wire.drafter),
        speculative_tokens=wire.speculative_tokens,
    )


def _cannot_cross(name: str, value: object, instead: str) -> OptionError:
    return OptionError(
        f"{name} has {shown(value)}, and the model runs in its own process, where functions of this one cannot "
        f"run; {instead}, or load the model without process=True"
    )


def _pack_drafter(speculative: object) -> str | tuple[int, ...] | None:
    if speculative is None:
        return None
    if speculative is NgramDrafter:
        return "ngram"
    if isinstance(speculative, ProposedTokens):
        return tuple(speculative.tokens)
    raise _cannot_cross("speculative", speculative, 'use "ngram"')


def _unpack_drafter(drafter: str | tuple[int, ...] | None) -> type[NgramDrafter] | ProposedTokens | None:
    if drafter is None:
        return None
    return NgramDrafter if isinstance(drafter, str) else ProposedTokens(drafter)


def pack_grammar(grammar: Grammar) -> WireGrammar:
    """Return a grammar for a message."""
    return WireGrammar(grammar.kind, grammar.source, grammar.root)


def _pack_grammar(grammar: Grammar | None) -> WireGrammar | None:
    return None if grammar is None else pack_grammar(grammar)


@lru_cache(maxsize=128)
def unpack_grammar(wire: WireGrammar) -> Grammar:
    """Return the grammar of a message. Cached, because checking one is slow."""
    return Grammar(wire.kind, wire.source, wire.root)


def _unpack_grammar(wire: WireGrammar | None) -> Grammar | None:
    return None if wire is None else unpack_grammar(wire)


def _pack_markers(markers: Markers | None) -> WireMarkers | None:
    return None if markers is None else WireMarkers(markers.open, markers.close)


def _unpack_markers(wire: WireMarkers | None) -> Markers | None:
    return None if wire is None else Markers(wire.open, wire.close)


def _pack_phases(phases: PhaseOptions | None) -> WirePhases | None:
    if phases is None:
        return None
    values = {field.name: getattr(phases, field.name) for field in fields(PhaseOptions)}
    for name in ("thinking", "calls", "payload"):
        values[name] = _pack_markers(values[name])
    return WirePhases(**{**values, "call_grammar": _pack_grammar(phases.call_grammar)})


def _unpack_phases(wire: WirePhases | None) -> PhaseOptions | None:
    if wire is None:
        return None
    values = {field.name: getattr(wire, field.name) for field in fields(PhaseOptions)}
    for name in ("thinking", "calls", "payload"):
        values[name] = _unpack_markers(values[name])
    return PhaseOptions(**{**values, "call_grammar": _unpack_grammar(wire.call_grammar)})


# --- progress and pieces ---------------------------------------------------------------------------


def pack_generator(state: SamplingState) -> bytes:
    """Return the part of a sampler's state that each draw changes."""
    return state.position[0].to_bytes(_GENERATOR_BYTES, "little")


def pack_state(state: SamplingState) -> WireSamplingState:
    """Return the state of a sampler for a message."""
    _, increment, has_uint32, uinteger = state.position
    return WireSamplingState(
        state.seed,
        pack_generator(state),
        increment.to_bytes(_GENERATOR_BYTES, "little"),
        has_uint32,
        uinteger,
        state.mu,
    )


def unpack_state(wire: WireSamplingState) -> SamplingState:
    """Return the state of a sampler in a message."""
    value, increment = int.from_bytes(wire.state, "little"), int.from_bytes(wire.increment, "little")
    return SamplingState(wire.seed, (value, increment, wire.has_uint32, wire.uinteger), wire.mu)


def pack_hit(hit: CacheHit) -> WireHit:
    """Return a cache hit for a message."""
    return WireHit(hit.kind, hit.tier, hit.tokens)


def unpack_hit(wire: WireHit) -> CacheHit:
    """Return the cache hit of a message."""
    return CacheHit(cast(HitKind, wire.kind), wire.tier, wire.tokens)


def pack_progress(progress: ReplyProgress, *, with_state: bool) -> WireProgress:
    """Return the progress of a reply for a message.

    Args:
        with_state: include the state of the sampler.
    """
    return WireProgress(
        progress.tokens,
        tuple(WireLogprobs(*logprobs) for logprobs in progress.logprobs),
        pack_state(progress.sampling_state) if with_state else None,
        progress.queued,
        None if progress.hit is None else pack_hit(progress.hit),
        progress.thinking_ended,
        progress.stored,
    )


def unpack_progress(wire: WireProgress) -> ReplyProgress:
    """Return the progress of a reply in a message."""
    assert wire.state is not None
    return ReplyProgress(
        wire.tokens,
        tuple(TokenLogprobs(*logprobs) for logprobs in map(_astuple, wire.logprobs)),
        unpack_state(wire.state),
        wire.queued,
        None if wire.hit is None else unpack_hit(wire.hit),
        wire.thinking_ended,
        wire.stored,
    )


def _astuple(logprobs: WireLogprobs) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    return logprobs.token, logprobs.logprob, logprobs.top


def pack_logprobs(logprobs: tuple[TokenLogprobs, ...]) -> tuple[WireLogprobs, ...]:
    """Return log-probabilities for a message."""
    return tuple(WireLogprobs(*each) for each in logprobs)


def unpack_logprobs(wire: tuple[WireLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
    """Return the log-probabilities of a message."""
    return tuple(TokenLogprobs(*_astuple(each)) for each in wire)


def pack_piece(piece: Piece) -> WirePiece:
    """Return a piece of a reply for a message."""
    if isinstance(piece, int):
        return piece
    if isinstance(piece, DeltaPiece):
        return WireDelta(piece.kind, piece.text, piece.tokens, pack_logprobs(piece.logprobs))
    if isinstance(piece, EndPiece):
        return WireEnd(piece.kind, piece.raw)
    return WireTokens(piece.tokens, piece.is_last)


def unpack_piece(wire: WirePiece) -> Piece:
    """Return the piece of a reply in a message."""
    if isinstance(wire, int):
        return wire
    if isinstance(wire, WireDelta):
        return DeltaPiece(wire.kind, wire.text, wire.tokens, unpack_logprobs(wire.logprobs))  # type: ignore[arg-type]
    if isinstance(wire, WireEnd):
        return EndPiece(wire.kind, wire.raw)  # type: ignore[arg-type]
    return TextTokens(wire.tokens, wire.is_last)


# --- results ---------------------------------------------------------------------------------------


def pack_ids(ids: NDArray[np.int32]) -> bytes:
    """Return token ids for a message."""
    return ids.astype("<i4", copy=False).tobytes()


def unpack_ids(raw: bytes) -> NDArray[np.int32]:
    """Return the token ids of a message, int32, shape (n,)."""
    return np.frombuffer(raw, "<i4").astype(np.int32, copy=False)


def pack_completion(reply: Completion) -> WireCompletion:
    """Return a completion for a message."""
    t = reply.timings
    return WireCompletion(
        text=reply.text,
        tokens=pack_ids(np.array(reply.tokens, np.int32)),
        finish_reason=reply.finish_reason,
        finish_key=reply.finish_key,
        cache=pack_hit(reply.cache),
        read=reply.cache_delta.read,
        created=reply.cache_delta.created,
        state=pack_state(reply.sampling_state),
        timings=(t.queued, t.restore, t.prefill, t.decode, t.prefill_tokens, t.decode_tokens),
        stop_sequence=reply.stop_sequence,
        stop_token=reply.stop_token,
        logprobs=None if reply.logprobs is None else pack_logprobs(reply.logprobs),
        thinking=reply.thinking,
        thinking_signature=reply.thinking_signature,
        drafts=None if reply.drafts is None else (reply.drafts.drafted, reply.drafts.accepted),
        raw_tool_calls=reply.raw_tool_calls,
        tool_call_places=reply.tool_call_places,
    )


def unpack_completion(wire: WireCompletion, prompt: NDArray[np.int32], restarts: int) -> Completion:
    """Return the completion of a message.

    Args:
        prompt: of its request.
        restarts: how often the process was replaced meanwhile.
    """
    tokens = tuple(unpack_ids(wire.tokens).tolist())
    return Completion(
        text=wire.text,
        tokens=tokens,
        context_tokens=(*prompt.tolist(), *tokens),
        finish_reason=cast(FinishReason, wire.finish_reason),
        finish_key=wire.finish_key,
        cache=unpack_hit(wire.cache),
        cache_delta=CacheDelta(wire.read, wire.created),
        seed=wire.state.seed,
        sampling_state=unpack_state(wire.state),
        timings=Timings(*wire.timings),
        stop_sequence=wire.stop_sequence,
        stop_token=wire.stop_token,
        logprobs=None if wire.logprobs is None else unpack_logprobs(wire.logprobs),
        thinking=wire.thinking,
        thinking_signature=wire.thinking_signature,
        drafts=None if wire.drafts is None else Drafts(*wire.drafts),
        raw_tool_calls=wire.raw_tool_calls,
        tool_call_places=wire.tool_call_places,
        restarts=restarts,
    )


def pack_metrics(metrics: EngineMetrics) -> WireMetrics:
    """Return metrics for a message."""
    return WireMetrics(
        metrics.finished.copy(),
        metrics.failed.copy(),
        tuple(getattr(metrics, name) for name in _COUNTS),
        (tuple(metrics.first_token.counts), metrics.first_token.total),
        (tuple(metrics.between_tokens.counts), metrics.between_tokens.total),
    )


def add_metrics(metrics: EngineMetrics, wire: WireMetrics) -> None:
    """Add the metrics of a message to others."""
    for reason, n in wire.finished.items():
        metrics.finished[reason] = metrics.finished.get(reason, 0) + n
    for name, n in wire.failed.items():
        metrics.failed[name] = metrics.failed.get(name, 0) + n
    for name, n in zip(_COUNTS, wire.counts, strict=True):
        setattr(metrics, name, getattr(metrics, name) + n)
    for histogram, (counts, total) in (
        (metrics.first_token, wire.first_token),
        (metrics.between_tokens, wire.between_tokens),
    ):
        _add_histogram(histogram, counts, total)


def _add_histogram(histogram: Histogram, counts: tuple[int, ...], total: float) -> None:
    histogram.counts = [a + b for a, b in zip(histogram.counts, counts, strict=True)]
    histogram.total += total


# --- errors ----------------------------------------------------------------------------------------


def pack_error(error: BaseException) -> WireError:
    """Return an error for a message."""
    for kind in type(error).__mro__:
        if issubclass(kind, errors.Error) and vars(errors).get(kind.__name__) is kind:
            return WireError(
                kind.__name__, _as_utf8(str(error)), getattr(error, "line", None), getattr(error, "column", None)
            )
    return WireError("BackendError", _as_utf8(f"{type(error).__name__}: {error}"))


def _as_utf8(message: str) -> str:
    """Return a message that can be sent: the names of files in it may have bytes that are not UTF-8."""
    return message.encode("utf-8", "backslashreplace").decode()


def unpack_error(wire: WireError) -> errors.Error:
    """Return the error of a message."""
    kind = vars(errors).get(wire.kind)
    if not isinstance(kind, type) or not issubclass(kind, errors.Error):
        return errors.BackendError(f"{wire.kind}: {wire.message}")
    if kind is errors.GrammarError:
        return errors.GrammarError(wire.message, line=wire.line, column=wire.column)
    return kind(wire.message)
