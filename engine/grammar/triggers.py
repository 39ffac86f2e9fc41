"""Lazy grammars: the grammar applies from the first trigger in the reply on.

`engine.scheduling.model_context` makes the matchers, and the sequence of a reply owns one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Vocabulary
from erllama.engine.grammar.matcher import Matcher
from erllama.errors import GrammarError


class LazyMatcher:
    """Allows every token until a trigger appears, then applies its matcher from the trigger's first byte on.

    Args:
        matcher: the matcher of the grammar, in its initial state.
        triggers: texts and token ids. A text may cross the borders of tokens; the first by position starts the
            grammar. A token id starts the grammar with that token.
    """

    def __init__(self, matcher: Matcher, vocabulary: Vocabulary, triggers: Sequence[str | int]) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._texts = [trigger.encode() for trigger in triggers if isinstance(trigger, str)]
        self._tokens = frozenset(trigger for trigger in triggers if not isinstance(trigger, str))
        self._longest = max(map(len, self._texts), default=0)
        self._recent = b""
        self._begun = False

    @property
    def begun(self) -> bool:
        """Whether a trigger has appeared."""
        return self._begun

    def allowed(self) -> NDArray[np.bool_] | None:
        return self._matcher.allowed() if self._begun else None

    def forced(self) -> list[int]:
        return self._matcher.forced() if self._begun else []

    @property
    def stopped(self) -> bool:
        return self._begun and self._matcher.stopped

    def accept(self, token: int) -> None:
        if self._begun:
            self._matcher.accept(token)
        elif token in self._tokens:
            self._begun = True
            self._matcher.accept(token)
        else:
            self.read(self._vocabulary.piece(token))

    def read(self, text: bytes) -> None:
        """Advance by a text.

        Raises:
            GrammarError: the text has a trigger, and the grammar does not allow the text after it.
        """
        self._recent += text
        found = [at for text in self._texts if (at := self._recent.find(text)) >= 0]
        if found:
            self._begun = True
            start = self._recent[min(found) :]
            if not self._matcher.accept_text(start):
                shown = start.decode("utf-8", "replace")
                raise GrammarError(f"the grammar does not allow {shown!r}, the text from its trigger on")
        elif self._texts:
            # The end of the text may be the beginning of a trigger.
            self._recent = self._recent[len(self._recent) - min(len(self._recent), self._longest - 1) :]
