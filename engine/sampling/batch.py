"""Sampling of all rows of a tick: rows with the same kinds of steps are computed together.

Each row gets the token that `Sampler.sample` returns for it alone, and takes the same numbers from its generator.
`Sampler.sample` samples a row if one of its steps has no form for many rows, and if its logits leave no token: it
then raises the error that describes them. The scheduler calls `sample_rows` once for each tick.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.engine.sampling.candidates import mask_logits
from erllama.engine.sampling.declaration import WholeRowsStep
from erllama.engine.sampling.rows import RowPlan, RowSelection, draw_positions
from erllama.engine.sampling.sampler import Sampler
from erllama.errors import Error, SamplingError

log = logger("erllama.engine")
# Rows with the same plan from which on computing them together is faster. The calls take as long as seven rows do
# alone.
_MIN_ROWS = 8
# Bytes of logits that are computed together. They are read more than once, so more would not stay in the caches of
# the processor. Fewer make more calls.
_BLOCK = 4 << 20


def sample_rows(
    samplers: Sequence[Sampler],
    logits: NDArray[np.float32],
    contexts: Sequence[NDArray[np.int32]],
    allowed: Sequence[NDArray[np.bool_] | None],
) -> list[int | Error]:
    """Sample one token for each row of logits.

    Args:
        samplers: the sampler of each row; no sampler twice.
        logits: shape (n, n_vocab); not changed. -inf excludes a token.
        contexts: for each row, prompt and reply so far, int32.
        allowed: for each row, the tokens that a grammar allows, shape (n_vocab,); None for all.

    Returns:
        the token of each row; of a row that fails, its error.
    """
    n = len(samplers)
    if n < _MIN_ROWS:
        return [_sample_alone(samplers[row], logits[row], contexts[row], allowed[row]) for row in range(n)]
    results: list[int | Error] = [0] * n
    alone: list[int] = []
    groups: dict[RowPlan | None, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.row_plan, []).append(row)
    for plan, rows in groups.items():
        if plan is None or len(rows) < _MIN_ROWS:
            alone += rows
            continue
        for row, token in zip(rows, _sample_group(plan, rows, samplers, logits, contexts, allowed), strict=True):
            if token < 0:
                alone.append(row)
            else:
                results[row] = token
    for row in alone:
        results[row] = _sample_alone(samplers[row], logits[row], contexts[row], allowed[row])
    return results


def _sample_alone(
    sampler: Sampler,
    logits: NDArray[np.float32],
    context: NDArray[np.int32],
    allowed: NDArray[np.bool_] | None,
) -> int | Error:
    try:
        return sampler.sample(logits, context, allowed)
    except Error as error:
        return error
    except BaseException as error:
        log.error("sampling failed unexpectedly", exc_info=error)
        failure = SamplingError(f"sampling failed unexpectedly: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def _sample_group(
    plan: RowPlan,
    rows: list[int],
    samplers: Sequence[Sampler],
    logits: NDArray[np.float32],
    contexts: Sequence[NDArray[np.int32]],
    allowed: Sequence[NDArray[np.bool_] | None],
) -> list[int]:
    """Return the token of each row with this plan; -1 for a row that must be sampled alone."""
    group = _Group(plan, rows, samplers, logits, contexts, allowed)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return group.sample()
    except BaseException:  # SystemExit, too: one row must not make the others fail
        log.exception("rows could not be sampled together")
        return [-1] * len(rows)


class _Group:
    """Rows with the same plan."""

    def __init__(
        self,
        plan: RowPlan,
        rows: list[int],
        samplers: Sequence[Sampler],
        logits: NDArray[np.float32],
        contexts: Sequence[NDArray[np.int32]],
        allowed: Sequence[NDArray[np.bool_] | None],
    ) -> None:
        self._plan, self._rows, self._logits = plan, rows, logits
        self._samplers = [samplers[row] for row in rows]
        self._contexts = [contexts[row] for row in rows]
        self._allowed = [allowed[row] for row in rows]

    def sample(self) -> list[int]:
        """Return the token of each row; -1 for a row that must be sampled alone. Such a row draws no number."""
        if not self._plan.ordered:
            return [token for block in self._blocks() for token in _argmax(block)]
        n_whole, n_vocab = len(self._plan.whole), self._logits.shape[1]
        steps = list(zip(*(sampler.steps[n_whole:] for sampler in self._samplers), strict=True))
        k = min(max(step.k for step in steps[0]), n_vocab)
        selection = RowSelection(k, n_vocab)
        for block in self._blocks():
            selection.add(block)
        ids, logits, is_plain = selection.candidates()
        logits[~is_plain, 0] = 0  # the steps may expect a finite logit
        for kind, of_rows in zip(self._plan.ordered, steps, strict=True):
            logits = kind.change_ordered_rows(of_rows, logits)
        plain = is_plain.tolist()
        shares = [sampler.random() if ok else 0.0 for sampler, ok in zip(self._samplers, plain, strict=True)]
        at = draw_positions(logits, np.array(shares))
        tokens = ids[np.arange(len(ids)), at].tolist()
        return [token if ok else -1 for token, ok in zip(tokens, plain, strict=True)]

    def _blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the logits of the rows, a block at a time, after the steps that change whole rows.

        A block is valid until the next one.
        """
        copies: NDArray[np.float32] | None = None
        n = max(_BLOCK // (self._logits.itemsize * self._logits.shape[1]), 1)
        for start in range(0, len(self._rows), n):
            part = slice(start, start + n)
            rows, masks = self._rows[part], self._allowed[part]
            is_masked = any(mask is not None for mask in masks)
            if not self._plan.whole and not is_masked and rows[-1] - rows[0] == len(rows) - 1:
                yield self._logits[rows[0] : rows[-1] + 1]
                continue
            if copies is None:
                # Once: writing to fresh memory takes several times as long as to memory that is in use.
                copies = np.empty((min(n, len(self._rows)), self._logits.shape[1]), np.float32)
            block = self._logits.take(rows, axis=0, out=copies[: len(rows)], mode="clip")  # "raise" copies twice
            if is_masked:
                _mask_rows(block, masks)
            for at, kind in enumerate(self._plan.whole):
                steps = [cast(WholeRowsStep, sampler.steps[at]) for sampler in self._samplers[part]]
                kind.change_rows(steps, block, self._contexts[part])
            yield block


def _mask_rows(block: NDArray[np.float32], masks: Sequence[NDArray[np.bool_] | None]) -> None:
    """Exclude the tokens that grammars do not allow, in place."""
    for row, mask in zip(block, masks, strict=True):
        # A mask must not hide NaN from the check of the model's logits.
        if mask is not None and np.isfinite(np.maximum.reduce(row)):
            row[:] = mask_logits(row, mask)


def _argmax(block: NDArray[np.float32]) -> list[int]:
    """Return the first of the largest logits of each row; -1 where it is not finite."""
    best: list[int] = block.argmax(axis=1).tolist()  # the first NaN, if there is one
    # Few functions of numpy: each takes 10 us while the processor's caches are cold, as they are after a decode.
    return [token if math.isfinite(block.item(row, token)) else -1 for row, token in enumerate(best)]
