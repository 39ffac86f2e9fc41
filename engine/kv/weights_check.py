"""Checks that a loaded model's weights are still those that its KV is stored under.

A backend may have a method `weights_problem`. It returns why the weights may have changed since they were loaded,
or an empty text. As long as there is a problem, KV is neither saved to the cache nor restored from it: every prompt
is computed, and its KV is for that request alone.
"""

from __future__ import annotations

from collections.abc import Callable

from erllama._runtime.log import logger
from erllama.engine.backend import Backend

log = logger("erllama.engine")


class Weights:
    """Checks the weights of one model. Safe to use from any thread."""

    def __init__(self, backend: Backend) -> None:
        self._find_problem: Callable[[], str] | None = getattr(backend, "weights_problem", None)
        self._warned = False

    @property
    def problem(self) -> str:
        """Why the model's KV is neither saved nor reused; empty if it is saved and reused."""
        if self._find_problem is None:
            return ""
        try:
            return self._find_problem()
        except Exception as error:
            return f"whether the weights have changed cannot be determined: {type(error).__name__}: {error}"

    def intact(self) -> bool:
        """Return whether KV may be saved and reused. Logs a warning the first time that it may not."""
        problem = self.problem
        if problem and not self._warned:
            self._warned = True
            log.warning(
                "%s. The model continues without the cache: its KV is neither saved nor reused. Load it again",
                problem,
            )
        return not problem
