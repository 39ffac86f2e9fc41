"""What all replies of a server add up to, for the metrics that llama-server's users know."""

from __future__ import annotations

from dataclasses import dataclass

from erllama.engine import Completion


@dataclass(slots=True)
class Totals:
    """Sums over the replies that ended, and over embeddings. Used by the event loop.

    Attributes:
        prompt_tokens, cached_tokens: prompt tokens that were computed, and those that were reused.
        prompt_seconds: time from the start of the work to the first token.
        reply_tokens, reply_seconds: tokens of replies, and the time from the first to the last of each.
        longest: tokens of the longest prompt with its reply.
        drafted, accepted: tokens that speculation computed ahead, and those of them that became part of a reply.
        drafts: replies with tokens computed ahead.
        embeddings: calls that computed embeddings or rankings.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    reply_tokens: int = 0
    reply_seconds: float = 0.0
    longest: int = 0
    drafted: int = 0
    accepted: int = 0
    drafts: int = 0
    embeddings: int = 0

    def add(self, completion: Completion) -> None:
        """Add a reply."""
        n_context, n_reply = len(completion.context_tokens), len(completion.tokens)
        self.prompt_tokens += n_context - n_reply - completion.cache.tokens
        self.cached_tokens += completion.cache.tokens
        self.prompt_seconds += completion.timings.restore + completion.timings.prefill
        self.reply_tokens += n_reply
        self.reply_seconds += completion.timings.decode
        self.longest = max(self.longest, n_context)
        if completion.drafts is not None:
            self.drafted += completion.drafts.drafted
            self.accepted += completion.drafts.accepted
            self.drafts += completion.drafts.drafted > 0

    def add_embeddings(self, n_tokens: int) -> None:
        """Add the tokens of a call that computes embeddings or rankings."""
        self.prompt_tokens += n_tokens
        self.embeddings += 1
