"""One request, from its submission to its end: its tokens, what of them is held, its reply so far."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from erllama.cache import SaveReason
from erllama.engine.grammar import Matcher
from erllama.engine.lazy import LazyMatcher
from erllama.engine.metrics import EngineMetrics
from erllama.engine.request import CacheHit, Completion, FinishReason, Timings
from erllama.engine.sampling import TokenLogprobs, log_probabilities
from erllama.engine.stops import StopScanner
from erllama.engine.text import TextDecoder
from erllama.engine.ticket import Ticket
from erllama.engine.warmth import Warmth, WarmthContext

# Cells kept for each reply that grows, when another request is admitted: else it would be sent back at once.
HEADROOM = 64


class Sequence:
    """The state of one request. Made by the caller's thread, then used by the model's alone.

    It may enter the context several times: where it had to give its cells to
    others, what it holds is saved, and it waits and is restored. What it draws
    from, its text and its stop strings stay with it, so the reply is the same.

    Attributes:
        ticket: the caller's end.
        namespace: the root key of what it may share.
        tokens: prompt and reply, int32; the first `n_known` are known, the first `n_held` in the context.
        number: the backend's for it, while it is in the context.
        leader, fork: another sequence that computes its first `fork` tokens just now, which it waits for.
        waits_until: until when it waits for the save of its parent; 0 where it does not.
        headroom: cells that it wants for its reply before it is admitted.
        ran_out_at: how many of its tokens were known when the backend last had no cells for it alone.
        finish_reason: None as long as it goes on.
    """

    def __init__(self, ticket: Ticket, shared: WarmthContext) -> None:
        self.ticket = ticket
        self._shared = shared
        self._vocabulary = shared.backend.vocabulary
        self._n_ctx = shared.backend.limits.n_ctx
        self.options = options = ticket.request.options
        self.namespace = shared.namespace(options.cache_salt)
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
        self.finish_reason: FinishReason | None = None
        self._warmth: Warmth | None = None
        self._due = 0.0  # how many tokens are held when something is to be saved
        self._finish_key: bytes | None = None  # of what it held when it last left
        self._sampler = shared.samplers.make(options.sampling, options.sampling_state)
        self._grammar = shared.grammar(options.grammar, options.grammar_triggers)
        self._decoder = TextDecoder()
        self._stops = StopScanner(options.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._unsent: list[int] = []  # drawn, and no piece told of them
        self._n_prefilled = 0
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
    def warmth(self) -> Warmth:
        assert self._warmth is not None
        return self._warmth

    # --- in and out of the context

    def enter(self, number: int, warmth: Warmth, n_held: int, hit: CacheHit, began: float) -> None:
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
        self.number = self._warmth = self.leader = None
        self.n_held = 0

    def next_end(self, most: int, alone: bool) -> int:
        """Where the next slice ends, if it may have `most` tokens; `alone`: in a batch, and context, of its own."""
        start = self.n_held
        if not self.prefilling:
            return start + 1
        slicing = self._shared.slicing
        if self.options.reproducible:
            # Where it starts anew, the reply so far is computed as it was: token by token.
            cut = slicing.next_cut(start, self.n_prompt, self.warmth.cold_tail_end)
            end = cut if start < self.n_prompt else start + 1
        elif alone:
            end = slicing.next_cut(start, self.n_known, self.warmth.cold_tail_end)
        else:
            end = slicing.next_mark(start, self.n_known, self.warmth.cold_tail_end)
        return min(end, start + most)

    def wants_logits(self, end: int) -> bool:
        return end == self.n_known and self.options.max_tokens != 0

    def decoded(self, end: int, alone: bool) -> None:
        """The rows up to `end` were computed; `alone` as they were cut."""
        start, self.n_held = self.n_held, end
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

    def draw(self, logits: NDArray[np.float32], now: float, metrics: EngineMetrics) -> None:
        """Sample the next token from logits, shape (n_vocab,), that were there at `now`."""
        grammar = self._grammar
        token = self._sampler.sample(logits, self.known, grammar.allowed() if grammar is not None else None)
        if self._last_token_at:
            metrics.between_tokens.observe(now - self._last_token_at)
        else:
            self._first_token_at = now
            metrics.first_token.observe(now - self.ticket.submitted)
        self._last_token_at = now
        if self._vocabulary.is_eog[token]:
            self.finish_reason = "stop"
            return
        if self.options.logprobs is not None:
            self._logprobs.append(log_probabilities(logits, token, self.options.logprobs))
        self._take(token)
        if grammar is not None:
            grammar.accept(token)
            self._take_forced(grammar)
            if self.finish_reason is None and grammar.stopped:
                self.finish_reason = "stop"

    def _take(self, token: int) -> None:
        """One token more of the reply."""
        self.tokens[self.n_known] = token
        self.n_known += 1
        self._unsent.append(token)
        self._say(self._decoder.feed(self._vocabulary.piece(token)))
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        elif self.options.max_tokens is not None and self.n_known - self.n_prompt >= self.options.max_tokens:
            self.finish_reason = "length"
        elif self.n_known > self._n_ctx:
            self.finish_reason = "context_full"

    def _take_forced(self, grammar: Matcher | LazyMatcher) -> None:
        """Where the grammar leaves one path, its tokens are the reply's, and are computed in one slice."""
        if self.options.logprobs is not None:
            return  # which are of each token's own row
        for token in grammar.forced() if self.finish_reason is None else ():
            if self.finish_reason is None:
                self._take(token)
                grammar.accept(token)

    def _say(self, text: str) -> None:
        """Pass text on, but for what may belong to a stop string."""
        released = self._stops.feed(text)
        if released or not (self._stops.holding or self._stops.matched):
            self._send(released)

    def _send(self, text: str) -> None:
        self._text.append(text)
        if self.ticket.streaming:
            told = self._logprobs[len(self._logprobs) - len(self._unsent) :] if self._logprobs else ()
            self.ticket.emit((text, tuple(self._unsent), tuple(told)))
        self._unsent.clear()

    def completion(self) -> Completion:
        """The result; text that was held back and is no stop string is sent first."""
        rest = self._stops.feed(self._decoder.finish()) + self._stops.finish()
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        if rest:
            self._send(rest)
        assert self.finish_reason is not None
        tokens = tuple(self.known.tolist())
        now = time.perf_counter()
        began = self._placed_at or now
        return Completion(
            text="".join(self._text),
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
            stop_sequence=self._stops.matched,
            logprobs=tuple(self._logprobs) if self.options.logprobs is not None else None,
        )
