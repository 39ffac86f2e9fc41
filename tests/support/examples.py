"""How many examples property tests run: ERLLAMA_EXAMPLES multiplies the numbers of the suite; `make stress`: 20."""

from __future__ import annotations

import os

_FACTOR = float(os.environ.get("ERLLAMA_EXAMPLES", "1"))


def examples(n: int) -> int:
    """Return `max_examples` of a test that runs `n` examples in the suite."""
    return max(round(n * _FACTOR), 1)
