"""The limit on the tokens of thinking.

`ThinkingBudget` counts them, and decides when the engine inserts the closing marker. Used by `Sequence`, in the
model thread.
"""

from __future__ import annotations

from erllama.engine.output.phase_options import PhaseOptions
from erllama.engine.output.phases import PhaseTracker
from erllama.engine.output.token_codec import TokenCodec

_CHARACTER_BYTES = 4  # maximum bytes of a character


class ThinkingBudget:
    """Counts the tokens of a reply's thinking.

    Attributes:
        closing: the tokens that end thinking when the budget is used up.
        inserted: whether the engine has begun to insert them into the current thought.
    """

    def __init__(self, options: PhaseOptions, close: str, codec: TokenCodec) -> None:
        self._limit = options.thinking_budget
        self.closing = codec.tokenize(options.budget_message + close)
        self._n_tokens = 0
        self._n_within_character = 0  # tokens in a row that ended within a character
        self.inserted = False

    def count(self, *, was_thinking: bool, is_thinking: bool, within_character: bool) -> None:
        """Count one token.

        Args:
            was_thinking: whether the reply was thinking before it.
            is_thinking: whether it is thinking now.
            within_character: whether it is within a character.
        """
        self._n_tokens += was_thinking and is_thinking
        self._n_within_character = self._n_within_character + 1 if within_character else 0
        self.inserted = self.inserted and is_thinking

    def is_used_up(self, tracker: PhaseTracker) -> bool:
        """Return whether to end thinking now: True once for each thought, and not within a character."""
        if self.inserted or self._limit is None or tracker.phase != "thinking" or self._n_tokens < self._limit:
            return False
        # An incomplete character of as many tokens as a character has bytes is invalid UTF-8: no need to wait.
        if tracker.ending or 0 < self._n_within_character < _CHARACTER_BYTES:
            return False
        self.inserted = True
        return True
