"""Grammars within the phases of a reply: thinking is free, the answer is kept to one grammar, calls to another."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from erllama.engine.grammar.matcher import Matcher
from erllama.engine.grammar.triggers import LazyMatcher
from erllama.engine.output.phases import PhaseTracker, Script
from erllama.engine.output.stops import WHITE
from erllama.errors import GrammarError


class PhasedMatcher:
    """Chooses, token by token, which grammar rules.

    Args:
        tracker: the reply's; it takes each token before this does.
        answer: what the answer must be of, or None.
        calls: what calls must be of, from their opening marker on, and all that follows; or None.
        openings: tokens of what may come before an answer, though its grammar has it not.
        closing: tokens that end thinking; none where nothing does.
        n_vocab: width of a mask.
        answer_is_text: what looks like a marker within the answer is none. Otherwise the answer is a call.
    """

    def __init__(
        self,
        tracker: PhaseTracker,
        script: Script,
        answer: Matcher | LazyMatcher | None,
        calls: Matcher | None,
        openings: Sequence[Sequence[int]],
        closing: Sequence[int],
        n_vocab: int,
        *,
        answer_is_text: bool,
    ) -> None:
        self._tracker, self._script = tracker, script
        self._answer, self._calls = answer, calls
        self._openings, self._closing, self._n_vocab = openings, closing, n_vocab
        self._answer_is_text = answer_is_text
        self._ruling: Matcher | LazyMatcher | None = None
        # Tokens of an opening that is not complete, and where the answer stands if they are the answer's.
        self._opened: list[int] = []
        self._instead: Matcher | None = None
        self._was_thinking = tracker.phase == "thinking"
        if isinstance(answer, Matcher):
            tracker.end_at_once()
        if isinstance(of_calls := calls if answer_is_text else answer, Matcher):
            tracker.follow(of_calls.fork())
        if tracker.held and answer is not None and not answer_is_text:
            self._begin_answer(answer, tracker.held)  # with what the prompt opened

    def allowed(self) -> NDArray[np.bool_] | None:
        if self._ruling is not None:
            return self._ruling.allowed()
        if self._answer is None or not self._answering:
            return None
        if self._opened and self._instead is None:
            allowed = np.zeros(self._n_vocab, np.bool_)
        elif (mask := (self._instead or self._answer).allowed()) is not None:
            allowed = mask.copy()
        else:
            return None  # it waits for its trigger
        allowed[self._following()] = True
        return allowed

    @property
    def _answering(self) -> bool:
        """Whether what comes is the answer's; a call is, where the answer must be one."""
        return self._tracker.phase != "thinking" and (not self._answer_is_text or self._tracker.phase == "text")

    def _following(self) -> list[int]:
        """Tokens by which an opening goes on."""
        n = len(self._opened)
        return [tokens[n] for tokens in self._openings if len(tokens) > n and list(tokens[:n]) == self._opened]

    def end_of_thought(self, token: int, *, ends_reply: bool) -> Sequence[int]:
        """What ends thinking in place of a token drawn there, which may not come.

        An answer is still to be begun: a token cannot end the reply, nor end thinking and go on as no answer
        begins. The model meant the end, so its thinking ends as it would have, in other tokens.

        Args:
            ends_reply: the token does.

        Returns:
            ids; none where the token may come.
        """
        tracker, answer = self._tracker, self._answer
        if self._ruling is not None or tracker.phase != "thinking" or not isinstance(answer, Matcher):
            return ()
        end = tracker.closing
        if not ends_reply:
            ahead = copy(tracker)
            ahead.feed(token)
            begun = ahead.behind.lstrip(WHITE)
            # What looks like a marker in an answer that is text is none, but only once its grammar rules.
            fits = ahead.phase == "text" or not self._answer_is_text
            if not begun or (fits and self._taken(answer.fork(), begun)):
                return ()
            end = self._script.of_token(token).removesuffix(ahead.behind)
        return self._script.spelled(end) or self._closing

    def forced(self) -> list[int]:
        return self._ruling.forced() if self._ruling is not None else []

    @property
    def stopped(self) -> bool:
        return self._ruling is not None and self._ruling.stopped

    def accept(self, token: int) -> None:
        """Go on by a token that the tracker has taken.

        Raises:
            GrammarError: it was not allowed.
        """
        tracker = self._tracker
        was_thinking, self._was_thinking = self._was_thinking, tracker.phase == "thinking"
        if self._ruling is not None:
            self._ruling.accept(token)
        elif tracker.kind == "call" and self._calls is not None:
            self._opened, self._instead = [], None
            self._begin_call(self._calls)
        elif self._answer is None or not self._answering:
            self._opened, self._instead = [], None
        elif was_thinking:
            self._begin_answer(self._answer, tracker.behind.lstrip(WHITE))
        else:
            self._take(self._answer, token)

    def _take(self, answer: Matcher | LazyMatcher, token: int) -> None:
        """A token of an opening, of the answer, or, until it is known, of either."""
        if isinstance(answer, LazyMatcher):
            answer.accept(token)
            if answer.begun:
                self._rule(answer)
        elif token in self._following():
            self._instead = _gone_on(self._instead if self._opened else answer.fork(), token)
            self._opened.append(token)
            if any(list(tokens) == self._opened for tokens in self._openings):
                self._opened, self._instead = [], None
        else:
            ruling = self._instead if self._opened and self._instead is not None else answer
            ruling.accept(token)
            self._rule(ruling)

    def _rule(self, answer: Matcher | LazyMatcher) -> None:
        self._ruling = answer
        if self._answer_is_text:
            self._tracker.settle()

    def _begin_answer(self, answer: Matcher | LazyMatcher, begun: str) -> None:
        """What came with the end of thinking, or of the prompt, is the beginning of what follows; as script."""
        if isinstance(answer, LazyMatcher):
            for part in self._script.runs(begun):
                answer.read(part) if isinstance(part, bytes) else answer.accept(part)
            if answer.begun:
                self._rule(answer)
        elif begun:
            if not self._taken(answer, begun):
                said = self._script.written(begun)
                raise GrammarError(f"the grammar does not begin with {said!r}, which came before the answer")
            self._rule(answer)

    def _begin_call(self, calls: Matcher) -> None:
        """The grammar of calls takes what there is of one; where it does not, the call is left to the model."""
        self._calls = None
        if self._taken(calls, self._tracker.call + self._tracker.held):
            self._ruling = calls

    def _taken(self, matcher: Matcher, script: str) -> bool:
        """Whether a matcher goes on by all of a script; where not, it is of no more use."""
        for part in self._script.runs(script):
            if isinstance(part, bytes):
                if not matcher.accept_text(part):
                    return False
            elif _gone_on(matcher, part) is None:
                return False
        return True


def _gone_on(matcher: Matcher | None, token: int) -> Matcher | None:
    """A matcher after a token; None where it does not take it."""
    if matcher is not None:
        try:
            matcher.accept(token)
        except GrammarError:
            return None
    return matcher
