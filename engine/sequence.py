"""One request on its way through the model: its tokens, its position, its reply so far."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from erllama.cache import SaveReason
from erllama.engine.backend import Backend, Batch
from erllama.engine.request import CacheHit, Completion, FinishReason, TextDelta, Ticket, Timings
from erllama.engine.sampling import Sampler
from erllama.engine.slices import Slicing
from erllama.engine.text import TextDecoder
from erllama.engine.warmth import Warmth, WarmthContext


class Sequence:
    """The state of one admitted request; used by the model thread alone.

    The runner asks for the next rows, decodes them, and hands the logits back,
    until `finish_reason` is set.
    """

    def __init__(self, ticket: Ticket, number: int, shared: WarmthContext, queued_seconds: float) -> None:
        self._ticket = ticket
        self._number = number
        self._backend: Backend = shared.backend
        self._slicing: Slicing = shared.slicing
        options = ticket.request.options
        self._warmth = Warmth(shared, number, len(ticket.request.prompt), options.cache_salt)
        self._sampler = Sampler(options.sampling)
        self._reproducible = options.reproducible
        self._parent_key = options.parent_key
        self._decoder = TextDecoder()
        self._text: list[str] = []
        prompt = ticket.request.prompt
        n_ctx = self._backend.limits.n_ctx
        room = n_ctx - len(prompt) + 1  # the last token sampled needs no cell
        self._max_tokens = options.max_tokens
        self._n_prompt = len(prompt)
        # Prompt and reply; grows to what this request can need, no further.
        n_reply = room if options.max_tokens is None else min(options.max_tokens, room)
        self._tokens = np.empty(len(prompt) + n_reply, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._n_tokens = len(prompt)  # known
        self._n_held = 0  # of them in the backend's memory
        self._decoding = False  # a batch was given out and has not come back
        self._hit = CacheHit("cold", None, 0)
        self.finish_reason: FinishReason | None = None
        self._queued = queued_seconds
        self._began = time.perf_counter()
        self._restored_at = self._first_token_at = self._began

    @property
    def prefilling(self) -> bool:
        return self._n_held < self._n_prompt

    @property
    def hit(self) -> CacheHit:
        return self._hit

    def restore(self) -> None:
        """Take what the cache has of the prompt."""
        self._hit = self._warmth.restore(self._prompt, self._reproducible, self._parent_key)
        self._n_held = self._hit.tokens
        self._restored_at = self._first_token_at = time.perf_counter()

    def next_batch(self) -> Batch:
        """The rows to decode next: a slice of the prompt, or the last token sampled."""
        start = self._n_held
        end = (
            self._slicing.next_cut(start, self._n_prompt, self._warmth.cold_tail_end)
            if self.prefilling
            else self._n_tokens
        )
        n = end - start
        output = np.zeros(n, np.int8)
        self._decoding = True
        # Logits of the last row, and only once the prompt is complete.
        output[-1] = end >= self._n_prompt
        return Batch(
            self._tokens[start:end],
            np.arange(start, end, dtype=np.int32),
            np.full(n, self._number, np.int32),
            output,
        )

    def decoded(self, batch: Batch, logits: NDArray[np.float32]) -> None:
        """Take note of a decoded batch; sample where it completed the prompt or a token of the reply."""
        self._decoding = False
        end = self._n_held + len(batch.tokens)
        prefilled = self.prefilling
        if prefilled:
            self._warmth.computed(self._n_held, end)
        self._n_held = end
        if prefilled:
            self._warmth.prefilled(self._tokens[:end])
        else:
            self._warmth.generated(self._tokens[:end])
        if end < self._n_prompt:
            return
        if prefilled:
            self._first_token_at = time.perf_counter()
        if self._max_tokens == 0:
            self.finish_reason = "length"
            return
        self._accept(self._sampler.sample(logits[0]))

    def _accept(self, token: int) -> None:
        vocabulary = self._backend.vocabulary
        if vocabulary.is_eog[token]:
            self.finish_reason = "stop"
            return
        self._tokens[self._n_tokens] = token
        self._n_tokens += 1
        text = self._decoder.feed(vocabulary.piece(token))
        self._text.append(text)
        self._ticket.emit(TextDelta(text, (token,)))
        if self._max_tokens is not None and self._n_tokens - self._n_prompt >= self._max_tokens:
            self.finish_reason = "length"
        elif self._n_held >= self._backend.limits.n_ctx:
            self.finish_reason = "context_full"

    def save(self, reason: SaveReason) -> None:
        """Save what the cache does not have yet of the tokens that the memory holds."""
        self._warmth.save_all(self._tokens[: self._n_held], reason)

    def recover(self) -> bool:
        """Go back to what was held before a decode that failed; False where nobody knows what is held now."""
        if not self._decoding:
            return True
        if self._backend.limits.can_trim:
            self._backend.cut(self._number, self._n_held)
            return True
        return False

    def completion(self) -> Completion:
        """The result; text that was held back for want of its last bytes is sent first."""
        rest = self._decoder.finish()
        if rest:
            self._text.append(rest)
            self._ticket.emit(TextDelta(rest, ()))
        assert self.finish_reason is not None
        tokens = tuple(self._tokens[: self._n_tokens].tolist())
        now = time.perf_counter()
        n_reply = self._n_tokens - self._n_prompt
        return Completion(
            text="".join(self._text),
            tokens=tokens[self._n_prompt :],
            context_tokens=tokens,
            finish_reason=self.finish_reason,
            finish_key=self._warmth.finish_key,
            cache=self._hit,
            seed=self._sampler.seed,
            timings=Timings(
                queued=self._queued,
                restore=self._restored_at - self._began,
                prefill=self._first_token_at - self._restored_at,
                decode=now - self._first_token_at,
                prefill_tokens=min(self._n_held, self._n_prompt) - self._hit.tokens,
                decode_tokens=max(n_reply - 1, 0),
            ),
        )

    @property
    def _prompt(self) -> NDArray[np.int32]:
        return self._tokens[: self._n_prompt]
