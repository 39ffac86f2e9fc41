"""Grammars within the phases of a reply: one for the answer, one for tool calls, none for thinking.

`PhasedMatcher` is a matcher over the whole reply, for `Sequence`. It follows the reply's `PhaseTracker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from erllama.engine.grammar.matcher import Matcher
from erllama.engine.grammar.triggers import LazyMatcher
from erllama.engine.output.phases import PhaseTracker
from erllama.engine.output.text import WHITE
from erllama.engine.output.token_codec import TokenCodec
from erllama.errors import GrammarError


class PhasedMatcher:
    """Chooses, token by token, which grammar is active.

    Args:
        tracker: the reply's tracker; it reads each token before this matcher does.
        codec: encodes the model's tokens.
        answer: the matcher of the answer, or None.
        calls: the matcher of calls, from their opening marker on, and of all that follows; or None.
        openings: the tokens of texts that may precede an answer, though its grammar does not contain them.
        closing: tokens that end thinking; empty if none do.
        n_vocab: width of a mask.
        answer_is_text: whether a marker within the answer is content. Otherwise the answer is a call.
    """

    def __init__(
        self,
        tracker: PhaseTracker,
        codec: TokenCodec,
        answer: Matcher | LazyMatcher | None,
        calls: Matcher | None,
        *,
        openings: Sequence[Sequence[int]],
        closing: Sequence[int],
        n_vocab: int,
        answer_is_text: bool,
    ) -> None:
        self._tracker, self._codec = tracker, codec
        self._answer, self._calls = answer, calls
        self._openings, self._closing, self._n_vocab = openings, closing, n_vocab
        self._answer_is_text = answer_is_text
        self._active: Matcher | LazyMatcher | None = None
        # The tokens of an incomplete opening, and the answer's matcher in case they belong to the answer.
        self._opening: list[int] = []
        self._alternative: Matcher | None = None
        self._was_thinking = tracker.phase == "thinking"
        if isinstance(answer, Matcher):
            tracker.end_at_first_marker()
        if isinstance(call_matcher := calls if answer_is_text else answer, Matcher):
            tracker.use_call_grammar(call_matcher.fork())
        if tracker.buffer and answer is not None and not answer_is_text:
            self._begin_answer(answer, tracker.buffer)  # with the marker that the prompt opened

    # --- what may be sampled

    def allowed(self) -> NDArray[np.bool_] | None:
        """Return the tokens that may be sampled, shape (n_vocab,); None for all."""
        if self._active is not None:
            return self._active.allowed()
        if self._answer is None or not self._in_answer:
            return None
        if self._opening and self._alternative is None:
            allowed = np.zeros(self._n_vocab, np.bool_)
        elif (mask := (self._alternative or self._answer).allowed()) is not None:
            allowed = mask.copy()
        else:
            return None  # the grammar waits for its trigger
        allowed[self._next_of_openings()] = True
        return allowed

    def forced(self) -> list[int]:
        """Return the tokens that the active grammar forces next."""
        return self._active.forced() if self._active is not None else []

    @property
    def stopped(self) -> bool:
        """Whether the active grammar is complete and allows no more text."""
        return self._active is not None and self._active.stopped

    @property
    def _in_answer(self) -> bool:
        """Whether the next token belongs to the answer. A call does, if the answer must be a call."""
        return self._tracker.phase != "thinking" and (not self._answer_is_text or self._tracker.phase == "text")

    def _next_of_openings(self) -> list[int]:
        """Return the tokens that continue an opening."""
        n = len(self._opening)
        return [tokens[n] for tokens in self._openings if len(tokens) > n and list(tokens[:n]) == self._opening]

    def thinking_end(self, token: int, *, ends_reply: bool) -> Sequence[int]:
        """Return the tokens that end thinking in place of a sampled token that is not allowed there.

        An answer must still follow. So a token must not end the reply, or end thinking and continue with text that
        cannot begin an answer. With such a token, the model ends its thinking: other tokens end it instead.

        Args:
            token: the sampled token.
            ends_reply: whether it ends the reply.

        Returns:
            ids; empty if the token is allowed.
        """
        tracker, answer = self._tracker, self._answer
        if self._active is not None or tracker.phase != "thinking" or not isinstance(answer, Matcher):
            return ()
        end = tracker.closing
        if not ends_reply:
            ahead = copy(tracker)
            ahead.feed(token)
            start = ahead.after_thinking.lstrip(WHITE)
            # In an answer that is text, a marker is content, but only once its grammar is active.
            fits = ahead.phase == "text" or not self._answer_is_text
            if not start or (fits and self._accepts(answer.fork(), start)):
                return ()
            end = self._codec.encode_token(token).removesuffix(ahead.after_thinking)
        return self._codec.exact_tokens(end) or self._closing

    # --- following the reply

    def accept(self, token: int) -> None:
        """Advance by a token that the tracker has read.

        Raises:
            GrammarError: it was not allowed.
        """
        tracker = self._tracker
        was_thinking, self._was_thinking = self._was_thinking, tracker.phase == "thinking"
        if self._active is not None:
            self._active.accept(token)
        elif tracker.kind == "call" and self._calls is not None:
            self._opening, self._alternative = [], None
            self._begin_call(self._calls)
        elif self._answer is None or not self._in_answer:
            self._opening, self._alternative = [], None
        elif was_thinking:
            self._begin_answer(self._answer, tracker.after_thinking.lstrip(WHITE))
        else:
            self._accept_before_answer(self._answer, token)

    def _accept_before_answer(self, answer: Matcher | LazyMatcher, token: int) -> None:
        """Accept a token of an opening, of the answer, or, until that is known, of either."""
        if isinstance(answer, LazyMatcher):
            answer.accept(token)
            if answer.begun:
                self._activate(answer)
        elif token in self._next_of_openings():
            self._alternative = _try_accept(self._alternative if self._opening else answer.fork(), token)
            self._opening.append(token)
            if any(list(tokens) == self._opening for tokens in self._openings):
                self._opening, self._alternative = [], None
        else:
            matcher = self._alternative if self._opening and self._alternative is not None else answer
            matcher.accept(token)
            self._activate(matcher)

    def _activate(self, answer: Matcher | LazyMatcher) -> None:
        self._active = answer
        if self._answer_is_text:
            self._tracker.treat_rest_as_text()

    def _begin_answer(self, answer: Matcher | LazyMatcher, start: str) -> None:
        """Begin the answer with encoded text that arrived with the end of thinking, or of the prompt."""
        if isinstance(answer, LazyMatcher):
            for part in self._codec.split(start):
                answer.read(part) if isinstance(part, bytes) else answer.accept(part)
            if answer.begun:
                self._activate(answer)
        elif start:
            if not self._accepts(answer, start):
                text = self._codec.decode(start)
                raise GrammarError(f"the grammar does not begin with {text!r}, which precedes the answer")
            self._activate(answer)

    def _begin_call(self, calls: Matcher) -> None:
        """Activate the grammar of calls if it accepts the call so far. Otherwise the call is unconstrained."""
        self._calls = None
        if self._accepts(calls, self._tracker.call + self._tracker.buffer):
            self._active = calls

    def _accepts(self, matcher: Matcher, encoded: str) -> bool:
        """Advance a matcher by a text. Returns False if it does not accept all of it; it is then unusable."""
        for part in self._codec.split(encoded):
            if isinstance(part, bytes):
                if not matcher.accept_text(part):
                    return False
            elif _try_accept(matcher, part) is None:
                return False
        return True


def _try_accept(matcher: Matcher | None, token: int) -> Matcher | None:
    """Advance a matcher by a token. Returns it, or None if it does not accept the token."""
    if matcher is not None:
        try:
            matcher.accept(token)
        except GrammarError:
            return None
    return matcher
