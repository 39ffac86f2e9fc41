"""Grammars within the phases of a reply: thinking is free, the answer is kept to one grammar, calls to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.grammar import Matcher
from erllama.engine.lazy import LazyMatcher
from erllama.engine.phases import PhaseTracker, Script
from erllama.errors import GrammarError

_WHITE = b" \t\r\n"


class PhasedMatcher:
    """Chooses, token by token, which grammar rules.

    Args:
        tracker: the reply's; it takes each token before this does.
        answer: what the answer must be of, or None.
        calls: what calls must be of, from their opening marker on, and all that follows; or None.
        openings: tokens of what may come before an answer, though its grammar has it not.
        n_vocab: width of a mask.
        answer_is_text: what looks like a marker within the answer is none.
    """

    def __init__(
        self,
        tracker: PhaseTracker,
        script: Script,
        answer: Matcher | LazyMatcher | None,
        calls: Matcher | None,
        openings: Sequence[Sequence[int]],
        n_vocab: int,
        *,
        answer_is_text: bool,
    ) -> None:
        self._tracker, self._script = tracker, script
        self._answer, self._calls = answer, calls
        self._openings, self._n_vocab = openings, n_vocab
        self._answer_is_text = answer_is_text
        self._ruling: Matcher | LazyMatcher | None = None
        # Tokens of an opening that is not complete, and where the answer stands if they are the answer's.
        self._opened: list[int] = []
        self._instead: Matcher | None = None
        self._was_thinking = tracker.phase == "thinking"
        if tracker.held and answer is not None and not answer_is_text:
            self._begin_answer(answer)  # with what the prompt opened

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

    @property
    def awaits_answer(self) -> bool:
        """Whether a grammar is still to be begun, without which the reply cannot end."""
        return self._ruling is None and isinstance(self._answer, Matcher)

    def forced(self) -> list[int]:
        return self._ruling.forced() if self._ruling is not None else []

    @property
    def stopped(self) -> bool:
        return self._ruling is not None and self._ruling.stopped

    def accept(self, token: int) -> None:
        """Go on by a token that the tracker has taken.

        Raises:
            GrammarError: what came with the end of thinking does not begin an answer.
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
            self._begin_answer(self._answer)
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

    def _begin_answer(self, answer: Matcher | LazyMatcher) -> None:
        """A token may hold the end of thinking and the beginning of what follows."""
        rest = self._script.plain(self._tracker.after + self._tracker.held).strip(_WHITE)
        if rest and isinstance(answer, Matcher):
            if not answer.accept_text(rest):
                raise GrammarError(f"the grammar does not begin with {rest!r}, which came with the end of thinking")
            self._rule(answer)

    def _begin_call(self, calls: Matcher) -> None:
        """The grammar of calls takes what there is of one; where it does not, the call is left to the model."""
        self._calls = None
        for part in self._script.runs(self._tracker.call + self._tracker.held):
            if isinstance(part, bytes):
                if not calls.accept_text(part):
                    return
            else:
                try:
                    calls.accept(part)
                except GrammarError:
                    return
        self._ruling = calls


def _gone_on(matcher: Matcher | None, token: int) -> Matcher | None:
    """A matcher after a token; None where it does not take it."""
    if matcher is not None:
        try:
            matcher.accept(token)
        except GrammarError:
            return None
    return matcher
