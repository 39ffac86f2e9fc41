"""Text to the tokens of a prompt, with the BOS and EOS tokens that the model wants, each once.

Texts from chat templates often contain their BOS spelled out. That is then the BOS of the prompt, and no second
one is added. Callers that need the BOS or EOS of a vocabulary use this module, so that all methods of a
model agree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Vocabulary
from erllama.errors import PromptTooLong

_MAX_UTF8 = 4  # bytes of a character


class PromptTokenizer:
    """Tokenizes prompts for one model. Thread-safe.

    Attributes:
        first, last: ids of the tokens that the model wants before and after a text; often none.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Found by means of a text that has no special token itself.
        text = vocabulary.tokenize("a", add_special=False).tolist()
        whole = vocabulary.tokenize("a", add_special=True).tolist()
        n = len(text)
        at = next((at for at in range(len(whole)) if whole[at : at + n] == text), None)
        self.first: list[int] = [] if at is None else whole[:at]
        self.last: list[int] = [] if at is None else whole[at + n :]

    def tokenize(self, text: str | bytes) -> NDArray[np.int32]:
        """Return the ids of a prompt, int32, shape (n,). Special tokens in the text are parsed."""
        ids = self._vocabulary.tokenize(text, add_special=False, parse_special=True)
        first = [] if self._has_first(ids) else self.first
        last = [] if self._has_last(ids) else self.last
        if not first and not last:
            return ids
        return np.concatenate([np.array(first, np.int32), ids, np.array(last, np.int32)])

    def check_length(self, *texts: str, n_ctx: int) -> None:
        """Refuse texts that cannot fit the context together, without tokenizing them.

        Raises:
            PromptTooLong: they have more bytes than `n_ctx` of the longest tokens.
        """
        longest: int = getattr(self._vocabulary, "longest_piece", 0)
        if not longest or longest * n_ctx >= _MAX_UTF8 * sum(map(len, texts)):
            return
        n_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if n_bytes > longest * n_ctx:
            raise PromptTooLong(
                f"the prompt has {n_bytes} bytes, which are {-(-n_bytes // longest)} tokens at least, and {n_ctx} "
                "fit; shorten it, or load the model with a larger n_ctx",
                n_tokens=-(-n_bytes // longest),
                n_ctx=n_ctx,
            )

    def _has_first(self, ids: NDArray[np.int32]) -> bool:
        return bool(ids[: len(self.first)].tolist() == self.first)

    def _has_last(self, ids: NDArray[np.int32]) -> bool:
        n = len(self.last)
        return bool(ids[len(ids) - n :].tolist() == self.last) if n <= len(ids) else False
