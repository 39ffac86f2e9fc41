"""One request from its submission to its end: its tokens, their KV, and its reply so far.

The caller's thread makes a `Sequence`; after that the model thread alone uses it. It may enter the context several
times: when it is preempted, its KV is saved, and it waits and is restored. It keeps its sampler, its text and its
stop strings, so the reply is the same. A request that continues the reply of another process replays its tokens.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import SaveReason
from erllama.cache.pipeline.fetcher import Fetch
from erllama.engine.adapters import AdapterSet
from erllama.engine.kv.sequence_kv import NO_TOKENS, SequenceKV, TokenRange
from erllama.engine.metrics import EngineMetrics
from erllama.engine.output.constraint import PhasedMatcher
from erllama.engine.output.thinking_budget import ThinkingBudget
from erllama.engine.requests.clock import RequestClock
from erllama.engine.requests.progress import ReplyProgress
from erllama.engine.requests.reply import Reply
from erllama.engine.requests.request import CacheDelta, CacheHit, Completion, FinishReason
from erllama.engine.requests.text_reply import TextReply, partial_character
from erllama.engine.requests.ticket import Ticket
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.sampler import Sampler, log_probabilities
from erllama.engine.scheduling.model_context import ModelContext
from erllama.engine.speculation import DecodeCosts, Drafts, Speculator
from erllama.errors import OptionError

log = logger("erllama.engine")

# Cells reserved for each reply that grows when another request is admitted. Without them, that request would be
# preempted at once.
HEADROOM = 64
# Rows of logits of one request in a decode, while its prompt is scored: each is as wide as the vocabulary.
_MAX_ROWS = 64


class Run(Protocol):
    """Consecutive ticks whose tokens are in the buffers already, and not counted in the sequences' `n_tokens`.

    Attributes:
        n_ticks: how many: each has one token of each sequence.
    """

    n_ticks: int


class SamplingInputs(NamedTuple):
    """What a sampler needs beside the logits, as `Sampler.sample` takes it."""

    sampler: Sampler
    context: NDArray[np.int32]
    allowed: NDArray[np.bool_] | None


class Sequence:
    """The state of one request.

    Args:
        ticket: the caller's end.
        context: what all sequences of the model share.
        adapters: the set in effect at submission, which the sequence keeps to its end.

    Attributes:
        ticket, adapters: the arguments.
        options: of the request.
        namespace: the root key of the KV that it may share.
        tenant: the same without adapters; a session belongs to one tenant.
        buffer: prompt and reply, int32. The first `n_tokens` are known; the KV of the first `n_computed` is in the
            context.
        n_prompt: tokens of the prompt.
        first_token: the first of them.
        is_plain: whether a sampled token changes its state only by being appended, unless the token ends the reply.
        slot: its slot in the context; None while it waits.
        leader, n_from_leader: another sequence that is computing the first `n_from_leader` tokens of this one. This
            one waits for it.
        fetch: reads blocks of its prompt from a remote tier; None outside of such a wait.
        parent_deadline: when to stop waiting for the save of the parent context; 0 if it has not begun to wait.
        headroom: cells for its reply that must be free when it is admitted.
        n_at_exhaustion: its `n_tokens` when the backend last ran out of cells for it alone.
        dequeued: whether the model thread has removed it from the queue.
        sampler: samples its tokens.
        clock: when its phases began.
        finish_reason: None until the reply ends.
        run: the run that the sequence is part of; None outside of runs.
    """

    def __init__(self, ticket: Ticket, context: ModelContext, adapters: AdapterSet = ()) -> None:
        self.ticket = ticket
        self._context = context
        self._vocabulary = context.backend.vocabulary
        self._n_ctx = context.backend.limits.n_ctx
        self.options = options = ticket.request.options
        self.adapters = adapters
        namespace = context.prefix_cache.namespace
        self.tenant = namespace(options.cache_salt, ())
        self.namespace = namespace(options.cache_salt, adapters) if adapters else self.tenant
        prompt = ticket.request.prompt
        self.n_prompt = len(prompt)
        room = self._n_ctx - len(prompt) + 1  # the last token sampled needs no cell
        n_reply = room if options.max_tokens is None else min(options.max_tokens, room)
        resumed = ticket.request.resumed
        if resumed is not None:
            resumed.check(options, self._vocabulary.n_tokens, n_reply)
        # The length that this request can reach at most.
        self.buffer = np.empty(len(prompt) + n_reply, np.int32)
        self.buffer[: len(prompt)] = prompt
        self.first_token = int(prompt[0])
        self.is_plain = TextReply.suits(options)
        self.n_tokens = len(prompt)
        self.n_computed = 0
        self.slot: int | None = None
        self.leader: Sequence | None = None
        self.n_from_leader = 0
        self.fetch: Fetch | None = None
        self.parent_deadline = 0.0
        self.headroom = HEADROOM
        self.n_at_exhaustion = 0
        self.dequeued = False
        self.finish_reason: FinishReason | None = None
        self.run: Run | None = None
        self._kv: SequenceKV | None = None
        self._next_save_at = 0.0  # tokens computed when the next block is due
        self._finish_key: bytes | None = None  # of its context when it last left
        sampling_state = options.sampling_state if resumed is None else resumed.sampling_state
        self.sampler = context.samplers.make(options.sampling, sampling_state)
        self._tracker = context.tracker(options, prompt)
        self._grammar = context.grammar(options, self._tracker)
        self._budget = self._make_thinking_budget()
        self._reply: Reply | TextReply = (
            TextReply(ticket, self._vocabulary) if self.is_plain else self._make_reply(prompt)
        )
        self._stop_tokens = context.stop_tokens(options)
        self._stop_token: int | None = None
        self._end_token: int | None = None  # that ended the reply, and is not part of it
        self._queued_tokens: deque[int] = deque()  # appended next, in place of sampled tokens
        self._speculator = self._make_speculator(prompt)
        self._n_scored = ticket.request.n_scored
        self._n_prefilled = 0
        # The positions that were saved for it and were not in the cache before.
        self._stored = TokenRange(*resumed.stored) if resumed is not None and resumed.stored[1] else NO_TOKENS
        self._hit = None if resumed is None else resumed.hit
        self._n_replayed = 0 if resumed is None else len(resumed.tokens)
        self.clock = RequestClock(ticket.submitted, has_reply=self._n_replayed > 0)
        if resumed is not None:
            try:
                self._replay(resumed)
            finally:
                ticket.drop_emitted()
        ticket.source = self

    def _make_reply(self, prompt: NDArray[np.int32]) -> Reply:
        partial = partial_character(prompt, self._vocabulary)
        return Reply(self.ticket, self.options, self._vocabulary, self._context.codec, self._tracker, partial)

    def _make_thinking_budget(self) -> ThinkingBudget | None:
        phases = self.options.phases
        if phases is None or phases.thinking_budget is None or phases.thinking is None:
            return None
        return ThinkingBudget(phases, phases.thinking.close[0], self._context.codec)

    def _make_speculator(self, prompt: NDArray[np.int32]) -> Speculator | None:
        make, limits = self.options.speculative, self._context.backend.limits
        if make is None or not limits.can_trim:
            return None
        return Speculator(make(prompt), self.options.speculative_tokens, limits.n_vocab)

    def _replay(self, progress: ReplyProgress) -> None:
        """Bring the reply to the state that it had in another process. Its pieces are not sent again.

        Raises:
            OptionError: the tokens are not those of a reply to this request.
        """
        for i, token in enumerate(progress.tokens):
            if self.finish_reason is not None:
                raise OptionError(f"resumed: the reply ends with token {i} of {self._n_replayed}")
            self._reply.logprobs.extend(progress.logprobs[i : i + 1])
            self._append(token)
        if progress.tokens and self.finish_reason is None and self._grammar is not None and self._grammar.stopped:
            self.finish_reason = "stop"
        if self._budget is not None:
            self._budget.inserted = progress.thinking_ended
        self._queued_tokens.extend(progress.queued)
        if self.finish_reason is None and progress.queued and self._vocabulary.is_eog[progress.queued[0]]:
            self._stop_at(self._queued_tokens.popleft())

    # --- state

    @property
    def hit(self) -> CacheHit | None:
        """How much of its prompt was reused when it first entered the context; None before."""
        return self._hit

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and reply so far, int32, shape (n_tokens,)."""
        return self.buffer[: self.n_tokens]

    @property
    def computed_tokens(self) -> NDArray[np.int32]:
        """The tokens whose KV is in the context, int32, shape (n_computed,)."""
        return self.buffer[: self.n_computed]

    @property
    def reusable(self) -> NDArray[np.int32]:
        """The leading tokens whose KV may be reused. The others are computed for their logits."""
        return self.buffer[: self._next_scored - 1 if self._n_scored else self.n_tokens - 1]

    @property
    def _next_scored(self) -> int:
        """The position of the next prompt token whose log-probability is reported."""
        return self.n_prompt - self._n_scored + len(self._reply.logprobs)

    @property
    def prefilling(self) -> bool:
        """Whether the next row is anything but the token sampled last."""
        return self.n_computed < max(self.n_prompt, self.n_tokens - 1)

    @property
    def waiting(self) -> bool:
        """Whether it is outside the context."""
        return self.slot is None

    @property
    def n_remaining(self) -> int:
        """The maximum number of tokens that can still be added to the reply."""
        return len(self.buffer) - self.n_tokens

    @property
    def kv(self) -> SequenceKV:
        """Its KV; only in the context."""
        assert self._kv is not None
        return self._kv

    # --- in and out of the context

    def enter_context(self, slot: int, kv: SequenceKV, hit: CacheHit, n_stored: int, began: float) -> None:
        """Enter the context, with the first `hit.tokens` tokens restored or shared.

        Args:
            n_stored: leading tokens that the cache had.
            began: when restoring began, on the clock of time.perf_counter.
        """
        self.slot, self._kv, self.n_computed = slot, kv, hit.tokens
        self._next_save_at = kv.next_save_at
        self.leader = self.fetch = None
        if not self.clock.entered:
            self.clock.enter(began)
            if self._hit is None:
                self._hit = hit

    def leave_context(self) -> None:
        """Leave the context. The caller releases the slot."""
        if self._kv is not None:
            self._finish_key = self._kv.finish_key
        self._record_stored()
        self.slot = self._kv = self.leader = self.fetch = None
        self.n_computed = 0

    def _record_stored(self) -> None:
        """Record which of its tokens were stored since it last entered the context."""
        if self._kv is not None:
            self._stored = self._stored.union(self._kv.stored)

    def recover(self) -> bool:
        """Restore the state before a decode that was aborted. Returns False if the state of its KV is unknown."""
        assert self.slot is not None
        if self._context.backend.limits.can_trim:
            self._context.backend.cut(self.slot, self.n_computed)
            return True
        return False

    # --- what the next decode computes

    def next_slice_end(self, max_tokens: int, alone: bool) -> int:
        """Return the end of the next slice.

        Args:
            max_tokens: maximum number of tokens of the slice.
            alone: whether it is the only sequence in the context and the batch.
        """
        start = self.n_computed
        if not self.prefilling:
            return start + 1
        slicing = self._context.prefix_cache.slicing
        if self._n_scored:
            max_tokens = min(max_tokens, self._next_scored - 1 - start + _MAX_ROWS)
        if self.options.reproducible:
            # After a restart, the reply so far is computed as it was: token by token.
            cut = slicing.next_cut(start, self.n_prompt, self.kv.cold_tail_end)
            end = cut if start < self.n_prompt else start + 1
        elif alone:
            end = slicing.next_cut(start, self.n_tokens, self.kv.cold_tail_end)
        else:
            end = slicing.next_mark(start, self.n_tokens, self.kv.cold_tail_end)
        return min(end, start + max_tokens)

    def output_positions(self, end: int) -> range:
        """Return the positions of the rows up to `end` that output logits; of drafts, all."""
        if self._n_scored:
            return range(self._next_scored - 1, min(end, self.n_prompt - 1))
        if end < self.n_tokens or self.options.max_tokens == 0:
            return range(0)
        return range(self.n_tokens - 1, end)

    @property
    def speculates(self) -> bool:
        """Whether more than its next token may be computed at once."""
        return self._speculator is not None and not self._queued_tokens

    def draft(self, max_drafts: int, n_rows: int, costs: DecodeCosts) -> int:
        """Write drafts behind its tokens. Returns how many.

        Args:
            max_drafts: maximum number of drafts.
            n_rows, costs: rows of the decode without drafts; how long decodes take.
        """
        assert self._speculator is not None
        try:
            drafts = self._speculator.draft(self.tokens, min(max_drafts, self.n_remaining - 1), n_rows, costs)
        except BaseException:
            log.exception("a drafter failed; its request continues without speculation")
            self._speculator = None
            return 0
        self.buffer[self.n_tokens : self.n_tokens + len(drafts)] = drafts
        return len(drafts)

    # --- what a decode computed

    def finish_slice(self, end: int, alone: bool) -> None:
        """Record that the rows up to `end` were computed.

        Args:
            alone: whether it was the only sequence in the context, and the batch was its slice.
        """
        start, self.n_computed = self.n_computed, end
        if alone:
            self.kv.add_ordered(start, end)
        if start < self.n_prompt:
            self._n_prefilled += min(end, self.n_prompt) - start
            if alone:
                self.kv.add_slice(start, end)
        if end == self.n_tokens and self.options.max_tokens == 0:
            self.finish_reason = "length"

    def advance(self, n: int, now: float, alone: bool) -> None:
        """Record `n` decodes of the token sampled last. The tokens sampled from them are in the buffer.

        Args:
            now: when the last of them was sampled.
            alone: as for `finish_slice`.
        """
        start = self.n_computed
        self.n_computed += n
        self.n_tokens += n
        if alone:
            self.kv.add_ordered(start, self.n_computed)
        self.clock.last_token_at = now

    @property
    def n_plain(self) -> int:
        """The number of decodes in which nothing happens but that a token is appended.

        The decode after them ends the reply, or makes a block due. 0 for a sequence that is not plain.
        """
        if not self.is_plain or self.slot is None or self.prefilling or self.finish_reason or self._queued_tokens:
            return 0
        before_save = self._next_save_at - self.n_computed
        return int(min(self.n_remaining, before_save)) - 1

    @property
    def is_scored(self) -> bool:
        """Whether the request scores tokens of its prompt instead of sampling."""
        return bool(self._n_scored)

    def score(self, logits: NDArray[np.float32]) -> None:
        """Score the next tokens of the prompt.

        Args:
            logits: shape (rows, n_vocab), of the rows of `output_positions`.
        """
        for row in logits:
            token = int(self.buffer[self._next_scored])
            self._reply.logprobs.append(log_probabilities(row, token, self.options.logprobs or 0))

    def verify_drafts(self, end: int, logits: NDArray[np.float32], now: float, metrics: EngineMetrics) -> None:
        """Sample from the rows up to `end`, as long as the drafts equal the samples. Sets `n_computed` accordingly.

        Args:
            logits: shape (n, n_vocab), of the last known token and of all drafts.
        """
        assert self._speculator is not None
        drafts = self.buffer[self.n_tokens : end].tolist()
        first = self.n_tokens
        self.n_computed = first
        for i in range(len(drafts) + 1):
            if self.n_computed == self.n_tokens:
                self._sample_alone(logits[i], now, metrics)
            if self.finish_reason is not None or i == len(drafts) or self.buffer[first + i] != drafts[i]:
                break
            self.n_computed += 1
        self._speculator.record(len(drafts), self.n_computed - first)

    def save_due(self) -> None:
        """Save the blocks that are due."""
        if self.n_computed <= self.n_prompt:
            self.kv.save_prefill(self.computed_tokens)
        elif self.n_computed >= self._next_save_at:
            self.kv.save_reply(self.computed_tokens)
        else:
            return
        self._next_save_at = self.kv.next_save_at

    def save(self, reason: SaveReason) -> None:
        """Save all computed tokens that the cache does not have yet."""
        self.kv.save_all(self.computed_tokens, reason)

    # --- sampling

    def sampling_inputs(self) -> SamplingInputs | None:
        """Return the inputs for sampling the next token; None if it is queued and not sampled."""
        self._end_thinking_if_due()
        if self._queued_tokens:
            return None
        sampler = self.sampler
        if self._tracker is not None and self._tracker.phase == "syntax":
            sampler = self._syntax_sampler
        return SamplingInputs(sampler, self.tokens, self._grammar.allowed() if self._grammar is not None else None)

    def accept(self, sampled: int | None, logits: NDArray[np.float32], now: float, metrics: EngineMetrics) -> None:
        """Append the next token.

        Args:
            sampled: the token sampled from `logits`; None if `sampling_inputs` returned None.
            logits: shape (n_vocab,).
            now: when they were computed.
        """
        token = self._queued_tokens.popleft() if sampled is None else self._replace_thinking_end(sampled)
        self.clock.add_token(now, metrics)
        if self._vocabulary.is_eog[token]:
            self._end_token = token
            self._stop_at(token)
            return
        if self.options.logprobs is not None:
            self._reply.logprobs.append(log_probabilities(logits, token, self.options.logprobs))
        self._append(token)
        if self.finish_reason is None and not self.is_plain:
            self._append_forced()
        if self._grammar is not None and self.finish_reason is None and self._grammar.stopped:
            self.finish_reason = "stop"

    def _sample_alone(self, logits: NDArray[np.float32], now: float, metrics: EngineMetrics) -> None:
        """Sample and append the next token, from logits of shape (n_vocab,)."""
        inputs = self.sampling_inputs()
        sampled = None
        if inputs is not None:
            sampled = inputs.sampler.sample(logits, inputs.context, inputs.allowed)
        self.accept(sampled, logits, now, metrics)

    @cached_property
    def _syntax_sampler(self) -> Sampler:
        """Samples the syntax of calls: the most likely token of those allowed."""
        sampling = self.options.sampling
        options = SamplingOptions(
            temperature=0.0, logit_bias=sampling.logit_bias, banned_tokens=sampling.banned_tokens
        )
        return self._context.samplers.make(options)

    def _append(self, token: int) -> None:
        """Append a token to the reply."""
        self.buffer[self.n_tokens] = token
        self.n_tokens += 1
        if token in self._stop_tokens:
            self._stop_at(token)
            return
        was_thinking = self._tracker is not None and self._tracker.phase == "thinking"
        self._reply.add(token)
        if self._budget is not None and self._tracker is not None:
            self._budget.count(
                was_thinking=was_thinking,
                is_thinking=self._tracker.phase == "thinking",
                within_character=self._reply.within_character,
            )
        if self._reply.stop_sequence is not None:
            self.finish_reason = "stop"
        elif self.options.max_tokens is not None and self.n_tokens - self.n_prompt >= self.options.max_tokens:
            self.finish_reason = "length"
        elif self.n_tokens > self._n_ctx:
            self.finish_reason = "context_full"
        if self._grammar is not None:
            self._grammar.accept(token)

    def _append_forced(self) -> None:
        """Append the tokens that are queued or that the grammar forces. They are computed in one slice."""
        if self.options.logprobs is not None:
            return  # each log-probability needs its token's own row
        self._end_thinking_if_due()
        while self._queued_tokens and self.finish_reason is None:
            self._append(self._queued_tokens.popleft())
        for token in self._grammar.forced() if self._grammar is not None and self.finish_reason is None else ():
            if self.finish_reason is None:
                self._append(token)

    def _stop_at(self, token: int) -> None:
        """End the reply at a token that ends generation, or at one of the caller's stop tokens."""
        self.finish_reason = "stop"
        if token in self._stop_tokens:
            self._stop_token = token
            assert isinstance(self._reply, Reply)
            self._reply.stop_at(self._stop_tokens[token])

    def _end_thinking_if_due(self) -> None:
        """Queue the tokens that end thinking, if it has used up its budget."""
        if self._budget is None or self._tracker is None or self._queued_tokens:
            return
        if self._budget.is_used_up(self._tracker):
            self._queued_tokens.extend(self._budget.closing)

    def _replace_thinking_end(self, token: int) -> int:
        """Return the token, or, if it may not end thinking, the first of the tokens that do; queue the others."""
        if isinstance(self._grammar, PhasedMatcher):
            ends_reply = bool(self._vocabulary.is_eog[token])
            self._queued_tokens.extend(self._grammar.thinking_end(token, ends_reply=ends_reply))
        return self._queued_tokens.popleft() if self._queued_tokens else token

    # --- resuming in another process

    def progress(self, n_known: int) -> ReplyProgress:
        """Return how far the reply has come, as `ProgressSource` does. Right also during a run."""
        n_tokens = self.n_tokens if self.run is None else self.n_tokens + self.run.n_ticks
        has_logprobs = self.options.logprobs is not None and not self._n_scored
        stored = self._stored if self._kv is None else self._stored.union(self._kv.stored)
        return ReplyProgress(
            tuple(self.buffer[self.n_prompt + n_known : n_tokens].tolist()),
            tuple(self._reply.logprobs[n_known:]) if has_logprobs else (),
            self.sampler.state,
            tuple(self._queued_tokens) if self._end_token is None else (self._end_token,),
            self._hit,
            self._budget is not None and self._budget.inserted,
            (stored.start, stored.end) if stored.end else (0, 0),
        )

    # --- the result

    def completion(self) -> Completion:
        """Return the result. The buffered rest of the reply is sent first."""
        reply, tokens = self._reply, tuple(self.tokens.tolist())
        if isinstance(reply, TextReply):
            reply.finish(tokens[self.n_prompt :])
        else:
            reply.finish()
        if reply.stop_sequence is not None:
            self.finish_reason = "stop"
        assert self.finish_reason is not None
        n_sampled = self.n_tokens - self.n_prompt - self._n_replayed
        return Completion(
            text=reply.text,
            tokens=tokens[self.n_prompt :],
            context_tokens=tokens,
            finish_reason=self.finish_reason,
            finish_key=self._kv.finish_key if self._kv is not None else self._finish_key,
            cache=self._hit or CacheHit("cold", None, 0),
            seed=self.sampler.seed,
            sampling_state=self.sampler.state,
            timings=self.clock.timings(self._n_prefilled, max(n_sampled - 1, 0)),
            stop_sequence=reply.stop_sequence,
            stop_token=self._stop_token if reply.at_stop_token else None,
            logprobs=tuple(reply.logprobs) if self.options.logprobs is not None else None,
            thinking=reply.thinking,
            thinking_signature=reply.signature,
            raw_tool_calls=tuple(reply.calls),
            tool_call_places=tuple(reply.places),
            cache_delta=self._cache_delta(),
            drafts=None if self.options.speculative is None else self._drafts(),
        )

    def _drafts(self) -> Drafts:
        speculator = self._speculator
        return Drafts(speculator.drafted, speculator.accepted) if speculator is not None else Drafts(0, 0)

    def _cache_delta(self) -> CacheDelta:
        self._record_stored()
        read = self._hit.tokens if self._hit is not None else 0
        start, end = self._stored
        return CacheDelta(read, max(end - max(start, read), 0))
