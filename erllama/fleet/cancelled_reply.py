"""Ends a cancelled request that no replica runs: its reply is what has come of it."""

from __future__ import annotations

import time

from erllama._process.protocol.wire_values import unpack_progress
from erllama._process.remote_requests import RemoteRequest
from erllama.engine import Ticket
from erllama.engine.backend import Vocabulary
from erllama.engine.output.phases import PhaseTracker
from erllama.engine.output.token_codec import TokenCodec
from erllama.engine.requests.reply import Reply
from erllama.engine.requests.request import CacheDelta, CacheHit, Completion, Timings
from erllama.engine.requests.text_reply import TextReply, partial_character
from erllama.engine.sampling.sampler import SamplerFactory
from erllama.engine.speculation import Drafts


def end_cancelled(request: RemoteRequest, vocabulary: Vocabulary, n_ctx: int) -> None:
    """End a request as a replica would that had the cancellation, with the tokens that it has.

    Args:
        vocabulary, n_ctx: of the model.
    """
    ticket = request.ticket
    options, prompt = ticket.request.options, ticket.request.prompt
    wire = request.progress()
    progress = None if wire is None else unpack_progress(wire)
    tokens = () if progress is None else progress.tokens
    reply, rest = _assemble(ticket, vocabulary, tokens)
    hit = (None if progress is None else progress.hit) or CacheHit("cold", None, 0)
    start, end = (0, 0) if progress is None else progress.stored
    if progress is None:
        state = SamplerFactory(vocabulary, n_ctx).make(options.sampling, options.sampling_state).state
    else:
        state = progress.sampling_state
    logprobs = () if progress is None else progress.logprobs
    ticket.flush()  # the pieces that a slow reader has not taken come before the last ones
    for piece in rest.take_pieces():
        ticket.emit(piece)
    ticket.finish(
        Completion(
            text=reply.text,
            tokens=tokens,
            context_tokens=(*prompt.tolist(), *tokens),
            finish_reason="cancelled" if reply.stop_sequence is None else "stop",
            finish_key=None,
            cache=hit,
            cache_delta=CacheDelta(hit.tokens, max(end - max(start, hit.tokens), 0)),
            seed=state.seed,
            sampling_state=state,
            timings=Timings(time.perf_counter() - ticket.submitted, 0.0, 0.0, 0.0, 0, 0),
            stop_sequence=reply.stop_sequence,
            logprobs=None if options.logprobs is None else logprobs,
            thinking=reply.thinking,
            thinking_signature=reply.signature,
            drafts=None if options.speculative is None else Drafts(0, 0),
            raw_tool_calls=tuple(reply.calls),
            tool_call_places=tuple(reply.places),
            restarts=request.restarts,
        )
    )


def _assemble(ticket: Ticket, vocabulary: Vocabulary, tokens: tuple[int, ...]) -> tuple[Reply | TextReply, Ticket]:
    """Return the reply of these tokens, and a ticket with the pieces that its reader does not have yet."""
    options, prompt = ticket.request.options, ticket.request.prompt
    rest = Ticket(ticket.request, streaming=ticket.streaming)
    if TextReply.suits(options):
        plain = TextReply(rest, vocabulary)
        plain.finish(tokens)
        return plain, rest
    codec = TokenCodec(vocabulary)
    tracker = None if options.phases is None else PhaseTracker(options.phases, codec, prompt)
    reply = Reply(rest, options, vocabulary, codec, tracker, partial_character(prompt, vocabulary))
    for token in tokens:
        reply.add(token)
    rest.drop_emitted()  # the reader has them
    reply.finish()
    return reply, rest
