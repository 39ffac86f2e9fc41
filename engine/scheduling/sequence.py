"""One request, from its submission to its end: its tokens, what of them is held, its reply so far."""

from __future__ import annotations

import time
from collections import deque
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import SaveReason
from erllama.engine.adapters import AdapterSet
from erllama.engine.kv.sequence_kv import NOTHING_STORED, SequenceKV
from erllama.engine.metrics import EngineMetrics
from erllama.engine.output.constraint import PhasedMatcher
from erllama.engine.output.phases import ThinkingBudget
from erllama.engine.output.text import unfinished
from erllama.engine.requests.reply import Reply
from erllama.engine.requests.request import CacheDelta, CacheHit, Completion, FinishReason, Timings
from erllama.engine.requests.ticket import Ticket
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.sampler import Sampler, log_probabilities
from erllama.engine.scheduling.model_context import ModelContext
from erllama.engine.speculation import DecodeCosts, Drafts, Speculator

log = logger("erllama.engine")

# Cells kept for each reply that grows, when another request is admitted: else it would be sent back at once.
HEADROOM = 64
# Rows of logits that one request has in a decode, where its prompt is scored: each is as wide as the vocabulary.
_MOST_ROWS = 64


class Sequence:
    """The state of one request. Made by the caller's thread, then used by the model's alone.

    It may enter the context several times: where it had to give its cells to
    others, what it holds is saved, and it waits and is restored. What it draws
    from, its text and its stop strings stay with it, so the reply is the same.

    Attributes:
        ticket: the caller's end.
        adapters: what it is computed with, from submission to end.
        namespace: the root key of what it may share.
        tenant: that of what it may share without adapters: sessions are of one tenant.
        tokens: prompt and reply, int32; the first `n_known` are known, the first `n_held` in the context.
        number: the backend's for it, while it is in the context.
        leader, fork: another sequence that computes its first `fork` tokens just now, which it waits for.
        waits_until: until when it waits for the save of its parent; 0 where it does not.
        headroom: cells that it wants for its reply before it is admitted.
        ran_out_at: how many of its tokens were known when the backend last had no cells for it alone.
        arrived: the model thread has taken it out of the queue.
        finish_reason: None as long as it goes on.
    """

    def __init__(self, ticket: Ticket, shared: ModelContext, adapters: AdapterSet = ()) -> None:
        self.ticket = ticket
        self._shared = shared
        self._vocabulary = shared.backend.vocabulary
        self._n_ctx = shared.backend.limits.n_ctx
        self.options = options = ticket.request.options
        self.adapters = adapters
        self.tenant = shared.namespace(options.cache_salt, ())
        self.namespace = shared.namespace(options.cache_salt, adapters) if adapters else self.tenant
        prompt = ticket.request.prompt
        self.n_prompt = len(prompt)
        room = self._n_ctx - len(prompt) + 1  # the last token sampled needs no cell
        n_reply = room if options.max_tokens is None else min(options.max_tokens, room)
        # Grows to what this request can need, no further.
        self.tokens = np.empty(len(prompt) + n_reply, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.n_known = len(prompt)
        self.n_held = 0
        self.number: int | None = None
        self.leader: Sequence | None = None
        self.fork = 0
        self.waits_until = 0.0
        self.headroom = HEADROOM
        self.ran_out_at = 0
        self.arrived = False
        self.finish_reason: FinishReason | None = None
        self._warmth: SequenceKV | None = None
        self._due = 0.0  # how many tokens are held when something is to be saved
        self._finish_key: bytes | None = None  # of what it held when it last left
        self._sampler = shared.samplers.make(options.sampling, options.sampling_state)
        self._tracker = shared.tracker(options, prompt)
        self._grammar = shared.grammar(options, self._tracker)
        self._budget = self._thinking_budget()
        begun = unfinished(map(self._vocabulary.piece, prompt[-4:].tolist()[::-1]))
        self._reply = Reply(ticket, options, self._vocabulary, shared.script, self._tracker, begun)
        self._stop_tokens = shared.stop_tokens(options)
        self._stop_token: int | None = None
        self._coming: deque[int] = deque()  # tokens that come next, whatever the model says
        self._speculator = self._speculating(prompt)
        self._n_scored = ticket.request.n_scored
        self._n_prefilled = 0
        self._stored = NOTHING_STORED  # from where to where the cache got what it did not have
        self._hit: CacheHit | None = None
        self._placed_at = self._restored_at = self._first_token_at = self._last_token_at = 0.0

    # --- where it stands

    @property
    def hit(self) -> CacheHit | None:
        """How warm it was when it first entered the context; None before."""
        return self._hit

    @property
    def known(self) -> NDArray[np.int32]:
        return self.tokens[: self.n_known]

    @property
    def reusable(self) -> NDArray[np.int32]:
        """Its first tokens, that it need not compute where others have; the rest it computes for their logits."""
        return self.tokens[: self._next_scored - 1 if self._n_scored else self.n_known - 1]

    @property
    def _next_scored(self) -> int:
        """The place of the next token of the prompt whose log-probability is to be told."""
        return self.n_prompt - self._n_scored + len(self._reply.logprobs)

    @property
    def held(self) -> NDArray[np.int32]:
        return self.tokens[: self.n_held]

    @property
    def prefilling(self) -> bool:
        """Whether the next row is not just the token drawn last."""
        return self.n_held < max(self.n_prompt, self.n_known - 1)

    @property
    def waiting(self) -> bool:
        """Whether it waits for others before it computes."""
        return self.number is None

    @property
    def growth(self) -> int:
        """How many tokens more it may come to hold, beyond those known."""
        return len(self.tokens) - self.n_known

    @property
    def warmth(self) -> SequenceKV:
        assert self._warmth is not None
        return self._warmth

    # --- in and out of the context

    def enter(self, number: int, warmth: SequenceKV, n_held: int, hit: CacheHit, began: float) -> None:
        """It is in the context now, and holds its first `n_held` tokens."""
        self.number, self._warmth, self.n_held = number, warmth, n_held
        self._due = warmth.due
        self.leader = None
        if self._hit is None:
            self._hit = hit
            self._placed_at = began
            self._restored_at = self._first_token_at = time.perf_counter()

    def leave(self) -> None:
        """It is no longer in the context."""
        if self._warmth is not None:
            self._finish_key = self._warmth.finish_key
        self._note_stored()
        self.number = self._warmth = self.leader = None
        self.n_held = 0

    def next_end(self, most: int, alone: bool) -> int:
        """Where the next slice ends, if it may have `most` tokens; `alone`: in a batch, and context, of its own."""
        start = self.n_held
        if not self.prefilling:
            return start + 1
        slicing = self._shared.slicing
        if self._n_scored:
            most = min(most, self._next_scored - 1 - start + _MOST_ROWS)
        if self.options.reproducible:
            # Where it starts anew, the reply so far is computed as it was: token by token.
            cut = slicing.next_cut(start, self.n_prompt, self.warmth.cold_tail_end)
            end = cut if start < self.n_prompt else start + 1
        elif alone:
            end = slicing.next_cut(start, self.n_known, self.warmth.cold_tail_end)
        else:
            end = slicing.next_mark(start, self.n_known, self.warmth.cold_tail_end)
        return min(end, start + most)

    def wanted(self, end: int) -> range:
        """Its positions whose logits are wanted of the rows up to `end`; of drafts, all."""
        if self._n_scored:
            return range(self._next_scored - 1, min(end, self.n_prompt - 1))
        if end < self.n_known or self.options.max_tokens == 0:
            return range(0)
        return range(self.n_known - 1, end)

    @property
    def speculates(self) -> bool:
        """Whether more than its next token may be computed at once."""
        return self._speculator is not None and not self._coming

    def draft(self, most: int, n_rows: int, costs: DecodeCosts) -> int:
        """Put tokens that are likely to come behind those known; how many."""
        assert self._speculator is not None
        try:
            drafts = self._speculator.draft(self.known, min(most, self.growth - 1), n_rows, costs)
        except BaseException:
            log.exception("a drafter failed; its request goes on without")
            self._speculator = None
            return 0
        self.tokens[self.n_known : self.n_known + len(drafts)] = drafts
        return len(drafts)

    def verify(self, end: int, logits: NDArray[np.float32], now: float, metrics: EngineMetrics) -> None:
        """Draw from the rows of drafts up to `end`, as far as they come true; what it holds is that far, then.

        Args:
            logits: shape (n, n_vocab), of the last known token and of all drafts.
        """
        assert self._speculator is not None
        drafts = self.tokens[self.n_known : end].tolist()
        first = self.n_known
        self.n_held = first
        for i in range(len(drafts) + 1):
            if self.n_held == self.n_known:
                self._draw(logits[i], now, metrics)
            if self.finish_reason is not None or i == len(drafts) or self.tokens[first + i] != drafts[i]:
                break
            self.n_held += 1
        self._speculator.judged(len(drafts), self.n_held - first)

    def decoded(self, end: int, alone: bool) -> None:
        """The rows up to `end` were computed; `alone`: as they were cut, with nobody else in the context."""
        start, self.n_held = self.n_held, end
        if alone:
            self.warmth.placed(start, end)
        if start < self.n_prompt:
            self._n_prefilled += min(end, self.n_prompt) - start
            if alone:
                self.warmth.computed(start, end)
        if end == self.n_known and self.options.max_tokens == 0:
            self.finish_reason = "length"

    def keep(self) -> None:
        """Save what is to be saved as it is computed."""
        if self.n_held <= self.n_prompt:
            self.warmth.prefilled(self.held)
        elif self.n_held >= self._due:
            self.warmth.generated(self.held)
        else:
            return
        self._due = self.warmth.due

    def save(self, reason: SaveReason) -> None:
        """Save what the cache does not have yet of the tokens that are held."""
        self.warmth.save_all(self.held, reason)

    def recover(self) -> bool:
        """Go back to what was held before a decode that was ended; False where nobody knows what is held now."""
        assert self.number is not None
        if self._shared.backend.limits.can_trim:
            self._shared.backend.cut(self.number, self.n_held)
            return True
        return False

    # --- the reply

    def answer(self, logits: NDArray[np.float32], now: float, metrics: EngineMetrics) -> None:
        """Take the logits that were wanted, shape (rows, n_vocab), and were there at `now`."""
        if not self._n_scored:
            self._draw(logits[0], now, metrics)
            return
        for row in logits:
            token = int(self.tokens[self._next_scored])
            self._reply.logprobs.append(log_probabilities(row, token, self.options.logprobs or 0))

    def _draw(self, logits: NDArray[np.float32], now: float, metrics: EngineMetrics) -> None:
        """Sample the next token from logits, shape (n_vocab,), that were there at `now`."""
        self._close_thinking()
        token = self._coming.popleft() if self._coming else self._ending_thought(self._sampled(logits))
        if self._last_token_at:
            metrics.between_tokens.observe(now - self._last_token_at)
        else:
            self._first_token_at = now
            metrics.first_token.observe(now - self.ticket.submitted)
        self._last_token_at = now
        if self._vocabulary.is_eog[token]:
            self._stop_at(token)
            return
        if self.options.logprobs is not None:
            self._reply.logprobs.append(log_probabilities(logits, token, self.options.logprobs))
        self._take(token)
        if self.finish_reason is None:
            self._take_certain()
        if self._grammar is not None and self.finish_reason is None and self._grammar.stopped:
            self.finish_reason = "stop"

    def _sampled(self, logits: NDArray[np.float32]) -> int:
        sampler = self._sampler
        if self._tracker is not None and self._tracker.phase == "syntax":
            sampler = self._syntax_sampler
        return sampler.sample(logits, self.known, self._grammar.allowed() if self._grammar is not None else None)

    def _ending_thought(self, token: int) -> int:
        """What comes for a token drawn: what ends thinking, where it is for an answer to begin behind that."""
        if isinstance(self._grammar, PhasedMatcher):
            ends_reply = bool(self._vocabulary.is_eog[token])
            self._coming.extend(self._grammar.end_of_thought(token, ends_reply=ends_reply))
        return self._coming.popleft() if self._coming else token

    @cached_property
    def _syntax_sampler(self) -> Sampler:
        """Takes the most likely token of those that may be had at all."""
        asked = self.options.sampling
        options = SamplingOptions(temperature=0.0, logit_bias=asked.logit_bias, banned_tokens=asked.banned_tokens)
        return self._shared.samplers.make(options)

    def _take(self, token: int) -> None:
        """One token more of the reply."""
        self.tokens[self.n_known] = token
        self.n_known += 1
        if token in self._stop_tokens:
            self._stop_at(token)
            return
        was_thinking = self._tracker is not None and self._tracker.phase == "thinking"
        self._reply.take(token)
        if self._budget is not None and self._tracker is not None:
            thinking = self._tracker.phase == "thinking"
            self._budget.count(before=was_thinking, after=thinking, within=self._reply.within_character)
        if self._reply.stop_sequence is not None:
            self.finish_reason = "stop"
        elif self.options.max_tokens is not None and self.n_known - self.n_prompt >= self.options.max_tokens:
            self.finish_reason = "length"
        elif self.n_known > self._n_ctx:
            self.finish_reason = "context_full"
        if self._grammar is not None:
            self._grammar.accept(token)

    def _stop_at(self, token: int) -> None:
        """The reply ends at a token: one that ends generation, or one of the caller's."""
        self.finish_reason = "stop"
        if token in self._stop_tokens:
            self._stop_token = token
            self._reply.stop_at(self._stop_tokens[token])

    def _take_certain(self) -> None:
        """What is certain to come is the reply's at once, and is computed in one slice."""
        if self.options.logprobs is not None:
            return  # which are of each token's own row
        self._close_thinking()
        while self._coming and self.finish_reason is None:
            self._take(self._coming.popleft())
        for token in self._grammar.forced() if self._grammar is not None and self.finish_reason is None else ():
            if self.finish_reason is None:
                self._take(token)

    def _close_thinking(self) -> None:
        """Where thinking has used its budget, its end comes next."""
        if self._budget is None or self._tracker is None or self._coming:
            return
        if self._budget.due(self._tracker):
            self._coming.extend(self._budget.closing)

    def _speculating(self, prompt: NDArray[np.int32]) -> Speculator | None:
        make = self.options.speculative
        if make is None or not self._shared.backend.limits.can_trim:
            return None
        return Speculator(make(prompt), self.options.speculative_tokens, self._shared.backend.limits.n_vocab)

    def _thinking_budget(self) -> ThinkingBudget | None:
        phases = self.options.phases
        if phases is None or phases.thinking_budget is None or phases.thinking is None:
            return None
        return ThinkingBudget(phases, phases.thinking.close[0], self._shared.script)

    def completion(self) -> Completion:
        """The result; what was held back of the reply is sent first."""
        reply = self._reply
        reply.finish()
        if reply.stop_sequence is not None:
            self.finish_reason = "stop"
        assert self.finish_reason is not None
        tokens = tuple(self.known.tolist())
        now = time.perf_counter()
        began = self._placed_at or now
        return Completion(
            text=reply.text,
            tokens=tokens[self.n_prompt :],
            context_tokens=tokens,
            finish_reason=self.finish_reason,
            finish_key=self._warmth.finish_key if self._warmth is not None else self._finish_key,
            cache=self._hit or CacheHit("cold", None, 0),
            seed=self._sampler.seed,
            sampling_state=self._sampler.state,
            timings=Timings(
                queued=began - self.ticket.submitted,
                restore=(self._restored_at or now) - began,
                prefill=(self._first_token_at or now) - (self._restored_at or now),
                decode=max(self._last_token_at - self._first_token_at, 0.0),
                prefill_tokens=self._n_prefilled,
                decode_tokens=max(self.n_known - self.n_prompt - 1, 0),
            ),
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
        found = self._speculator
        return Drafts(found.drafted, found.accepted) if found is not None else Drafts(0, 0)

    def _cache_delta(self) -> CacheDelta:
        self._note_stored()
        read = self._hit.tokens if self._hit is not None else 0
        start, end = self._stored
        return CacheDelta(read, max(end - max(start, read), 0))

    def _note_stored(self) -> None:
        """Which of its tokens were stored for it, since it last entered the context."""
        if self._warmth is not None:
            start, end = self._warmth.stored
            self._stored = min(start, self._stored[0]), max(end, self._stored[1])
