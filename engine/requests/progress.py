"""How far a reply has come: the values from which another process continues it.

The process of a model may end in the middle of a reply. Another process records the progress of the reply, tick by
tick, and submits the request again with `Request.resumed`. `Sequence` is the source of the progress, and resumes
from it. The continued reply equals the uninterrupted one, as that of a preempted request does.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from erllama.engine.requests.request import CacheHit, RequestOptions
from erllama.engine.sampling.sampler import SamplingState, TokenLogprobs
from erllama.errors import OptionError


class ReplyProgress(NamedTuple):
    """How far a reply has come, between two ticks. Made in every tick, so it is a tuple.

    Attributes:
        tokens: ids of the reply so far, including those that are not part of an event yet.
        logprobs: one for each of them, if requested; else empty.
        sampling_state: the state of the random draws after them.
        queued: ids that the engine appends next, in place of sampled ones. If an end token has ended the reply,
            that token, which is not part of the reply.
        hit: how much of the prompt was reused when the request first entered a context; None before.
        thinking_ended: whether the engine has begun to end the current thought, because it used up its budget.
        stored: positions (start, end) that were saved for the request and were not in the cache before; (0, 0) if
            none were.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    sampling_state: SamplingState
    queued: tuple[int, ...] = ()
    hit: CacheHit | None = None
    thinking_ended: bool = False
    stored: tuple[int, int] = (0, 0)

    def check(self, options: RequestOptions, n_vocab: int, max_tokens: int) -> None:
        """Check that a request can be resumed from here.

        Args:
            options: of the request.
            n_vocab: tokens of the model's vocabulary.
            max_tokens: maximum number of tokens of the reply.

        Raises:
            OptionError: it cannot.
        """
        for token in (*self.tokens, *self.queued):
            if not 0 <= token < n_vocab:
                raise OptionError(f"resumed: token id {token}; ids of this model are 0 to {n_vocab - 1}")
        n = len(self.tokens)
        if n > max_tokens:
            raise OptionError(
                f"resumed: {n} tokens of a reply that can have {max_tokens}; "
                "resume with the max_tokens and the n_ctx with which the reply began"
            )
        n_logprobs = 0 if options.logprobs is None else n
        if len(self.logprobs) != n_logprobs:
            raise OptionError(
                f"resumed: {len(self.logprobs)} log-probabilities of {n} tokens; "
                f"logprobs={options.logprobs} makes {n_logprobs}"
            )
        first = options.sampling_state
        seed = options.sampling.seed if first is None else first.seed
        if seed not in (None, self.sampling_state.seed):
            raise OptionError(f"resumed: seed {self.sampling_state.seed} of a request with seed={seed}")


class ProgressSource(Protocol):
    """A reply that is in progress. Used by the model thread alone, between two ticks."""

    def progress(self, n_known: int) -> ReplyProgress:
        """Return the progress, without the first `n_known` tokens of the reply and their log-probabilities."""
        ...
