"""The sampler of a request: a chain of steps, built once, and the draw of each token.

The default order of the steps is llama.cpp's. Equal logits give equal tokens, because candidates are ordered by
falling logits and ties by rising id. The model's thread calls `Sampler.sample` once for each token of a reply.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Vocabulary
from erllama.engine.sampling.candidates import LARGE, Candidates, mask_logits, top_k
from erllama.engine.sampling.declaration import ListStep, OrderedRowsStep, Step, StepContext, WholeRowsStep
from erllama.engine.sampling.draws import Categorical, Draw, Greedy, Mirostat, draw_from_list
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.rows import RowPlan
from erllama.engine.sampling.steps import CHAIN, LogitBias, TopK
from erllama.errors import OptionError, SamplingError

_STEPS = {step.name: step for step in CHAIN}
_MAX_LISTED = 128  # candidates that are faster in a list than in numpy, after a decode


class TokenLogprobs(NamedTuple):
    """The log-probability of a token by the model's own distribution, before any sampling step.

    `top` has the most likely ids with their log-probabilities, most likely first. All are natural logarithms.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SamplingState:
    """The state of a reply's draws. Another request can continue from it.

    Attributes:
        seed: the seed of the first draw.
        position: the state of the seed's generator, with the half of a number that it buffers.
        mu: the state of mirostat; None without mirostat.
    """

    seed: int
    position: tuple[int, int, int, int]
    mu: float | None = None


class SamplerFactory:
    """Makes the samplers of one model's requests, and keeps the values that they share. Thread-safe.

    Args:
        vocabulary: the model's vocabulary.
        n_ctx: tokens of its context.
    """

    def __init__(self, vocabulary: Vocabulary, n_ctx: int) -> None:
        self._context = StepContext(vocabulary, n_ctx)
        self._n_vocab = vocabulary.n_tokens
        self._ids = np.arange(self._n_vocab)
        self._ids.flags.writeable = False

    def make(self, options: SamplingOptions, state: SamplingState | None = None) -> Sampler:
        """Make the sampler of one request.

        Args:
            state: where the draws of an earlier request ended; None to start from the seed.

        Raises:
            OptionError: an option names a token outside the vocabulary.
        """
        n_vocab = self._n_vocab
        biases = dict(options.logit_bias or {}) | dict.fromkeys(options.banned_tokens, -math.inf)
        if biases and max(biases) >= n_vocab:
            name = "banned_tokens" if max(biases) in options.banned_tokens else "logit_bias"
            raise OptionError(f"{name} has token {max(biases)}; the vocabulary has 0 to {n_vocab - 1}")
        mirostat = Mirostat.from_options(options, n_vocab)
        steps: list[Step] = [LogitBias(biases)] if biases else []
        for name_or_step in options.samplers:
            step = self._step(name_or_step, options, mirostat=mirostat is not None)
            if step is not None:
                steps.append(step)
        draw: Draw = mirostat or (Greedy() if options.greedy else Categorical())
        return Sampler(options.seed, steps, draw, self._ids, state)

    def _step(self, step: str | Step, options: SamplingOptions, *, mirostat: bool) -> Step | None:
        """Return one step of the chain; None if it would change nothing."""
        if not isinstance(step, str):
            kind = _wrapper(type(step)) if isinstance(step, OrderedRowsStep) else CustomStep
            return kind(step, self._n_vocab)
        declared = _STEPS[step]
        if (mirostat and declared.drops_candidates) or (options.greedy and declared.keeps_best):
            return None
        return declared.from_options(options, self._context)


class CustomStep:
    """A step that the caller wrote. Checks what the step returns before anything is drawn from it."""

    def __init__(self, step: Step, n_vocab: int) -> None:
        self._step, self._n_vocab = step, n_vocab

    def __call__(self, candidates: Candidates) -> Candidates:
        name = getattr(self._step, "__qualname__", type(self._step).__qualname__)
        try:
            result = self._step(candidates)
        except BaseException as error:
            raise SamplingError(f"the step {name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(result, Candidates):
            raise SamplingError(f"the step {name} returned {type(result).__name__}, not Candidates")
        ids, logits = np.asarray(result.ids), np.asarray(result.logits)
        if ids.ndim != 1 or ids.shape != logits.shape or not len(ids) or ids.dtype.kind not in "iu":
            raise SamplingError(
                f"the step {name} returned ids of shape {ids.shape} and logits of {logits.shape}; "
                "return one logit for each id, and at least one"
            )
        if ids.min() < 0 or ids.max() >= self._n_vocab:
            raise SamplingError(f"the step {name} returned a token outside 0 to {self._n_vocab - 1}")
        logits = logits.astype(np.float32, copy=False)
        _check_finite(logits, f"the step {name}")
        return Candidates(
            ids.astype(np.intp, copy=False),
            logits,
            candidates.context,
            candidates.random,
            in_order=bool(result.in_order) and bool((logits[:-1] >= logits[1:]).all()),
        )


class CustomOrderedStep(CustomStep, OrderedRowsStep):
    """A custom step with a form for many rows. Checks what that form returns, too."""

    @classmethod
    def change_ordered_rows(
        cls, steps: Sequence[CustomOrderedStep], logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        customs = [cast(OrderedRowsStep, step._step) for step in steps]
        name, given = type(customs[0]).__qualname__, logits.copy()  # such a step may keep the array
        given.flags.writeable = False
        changed = np.asarray(customs[0].change_ordered_rows(customs, given))
        if changed.shape != logits.shape:
            raise SamplingError(f"{name}.change_ordered_rows returned shape {changed.shape}, not {logits.shape}")
        changed = changed.astype(np.float32, copy=False)
        falls = bool((changed[:, :-1] >= changed[:, 1:]).all()) and bool(np.isfinite(changed[:, 0]).all())
        if not falls or (changed[logits == -np.inf] > -np.inf).any():
            raise SamplingError(
                f"{name}.change_ordered_rows returned logits that do not fall from a finite one, or gave a token "
                "that was excluded a logit"
            )
        return changed


@lru_cache(64)
def _wrapper(kind: type[OrderedRowsStep]) -> type[CustomOrderedStep]:
    """Return a class for custom steps of one class, because rows with steps of one class are computed together."""
    return type(f"Custom{kind.__name__}", (CustomOrderedStep,), {})


def _check_finite(logits: NDArray[np.float32], source: str) -> None:
    """Raise SamplingError unless the largest logit is finite. NaN counts as the largest."""
    top = float(np.maximum.reduce(logits))
    if not math.isfinite(top):
        raise SamplingError(f"{source} leaves no token to sample: the largest logit is {top}")


class Sampler:
    """Draws the tokens of one request.

    Args:
        seed: fixes the draws; None draws one.
        steps: the chain, in this order.
        draw: chooses one of the candidates that remain.
        ids: all ids of the vocabulary, intp, shape (n_vocab,).
        state: where the draws of an earlier request ended.

    Attributes:
        seed: the seed in use.
        steps: the chain.
        row_plan: how the rows of many requests run this chain together; None if they run one by one.
        first_k: how many of the largest logits of a row the chain begins with; 0 if it is the most likely token
            alone; None if it begins with all logits.
        reads_context: whether a step may read the context.
        random: returns the next number of the request's generator, at least 0 and below 1.
    """

    def __init__(
        self,
        seed: int | None,
        steps: Sequence[Step],
        draw: Draw,
        ids: NDArray[np.intp],
        state: SamplingState | None = None,
    ) -> None:
        self.steps, self._draw, self._ids = tuple(steps), draw, ids
        self.row_plan = RowPlan.of(self.steps, draw, len(ids))
        # Any other chain takes no numbers from the generator, so its state never changes.
        self._draws = not isinstance(draw, Greedy) or not all(isinstance(step, WholeRowsStep) for step in steps)
        self._constant_state: SamplingState | None = None
        self.first_k: int | None = None
        if steps and isinstance(steps[0], TopK):
            self.first_k = min(steps[0].k, len(ids))
        elif not steps and isinstance(draw, Greedy):
            self.first_k = 0
        self._later_steps = self.steps[1:]
        self._list_steps: tuple[ListStep, ...] | None = None
        in_lists = all(isinstance(step, ListStep) for step in self._later_steps) and isinstance(draw, Categorical)
        if in_lists and 0 < (self.first_k or 0) <= _MAX_LISTED:
            self._list_steps = cast("tuple[ListStep, ...]", self._later_steps)
        self.reads_context = any(getattr(step, "reads_context", True) for step in self.steps)
        self._has_custom_steps = any(isinstance(step, CustomStep) for step in self.steps)
        if state is not None:
            seed = state.seed
        self.seed = secrets.randbits(64) if seed is None else seed
        self._generator = np.random.PCG64(self.seed)
        self._random = np.random.Generator(self._generator)
        self.random = self._random.random
        if state is not None:
            self._resume(state)

    def sample(
        self,
        logits: NDArray[np.float32],
        context: NDArray[np.int32],
        allowed: NDArray[np.bool_] | None = None,
    ) -> int:
        """Choose a token.

        Args:
            logits: shape (n_vocab,); not changed. -inf excludes a token.
            context: prompt and reply so far, int32, shape (m,).
            allowed: shape (n_vocab,): the tokens that a grammar allows; None for all.

        Raises:
            SamplingError: a logit is NaN, or no logit is finite, or a custom step failed.
        """
        if allowed is None and self.first_k is not None:
            if not self.first_k:
                best = int(logits.argmax())  # the first NaN, if there is one
                if not math.isfinite(logits[best]):
                    _check_finite(logits, "the model")
                return best
            largest = top_k(logits, self.first_k)
            if not math.isfinite(largest.best):
                _check_finite(logits, "the model")
            candidates = Candidates(largest.positions, largest.logits, context, self._random, in_order=True)
            return self._run(self._later_steps, candidates)
        _check_finite(logits, "the model")
        if allowed is not None:
            logits = mask_logits(logits, allowed)
            _check_finite(logits, "the grammar")
        candidates = Candidates.of_vocabulary(self._ids, logits, context, self._random)
        return self._run(self.steps, candidates)

    def sample_largest(self, ids: NDArray[np.intp], logits: NDArray[np.float32], context: NDArray[np.int32]) -> int:
        """Choose a token, given the result of the first step, which is `top_k`.

        Args:
            ids, logits: the `first_k` most likely tokens and their logits, in falling order, ties by rising id. The
                arrays may change after the call.
            context: as for `sample`; any array unless `reads_context`.

        Returns:
            the token; -1 if the first logit is not finite. `sample` then raises the error.

        Raises:
            SamplingError: a custom step failed.
        """
        if self._list_steps is not None:
            falling: list[float] = logits.tolist()
            if falling[0] <= LARGE and falling[-1] >= -LARGE:
                for step in self._list_steps:
                    falling = step.change_list(falling)
                    if not falling:
                        break
                else:
                    return ids.item(draw_from_list(falling, self.random()))
        if not math.isfinite(logits.item(0)):
            return -1
        if self._has_custom_steps:
            ids, logits = ids.copy(), logits.copy()  # such a step may keep candidates
        candidates = Candidates(ids, logits, context, self._random, in_order=True)
        return self._run(self._later_steps, candidates)

    def _run(self, steps: Sequence[Step], candidates: Candidates) -> int:
        for step in steps:
            candidates = step(candidates)
        if not math.isfinite(candidates.best()):
            _check_finite(candidates.logits, "the chain of samplers")
        return self._draw.draw(candidates)

    @property
    def state(self) -> SamplingState:
        """The state from which another sampler continues."""
        if self._draws:
            return self._read_state()
        if self._constant_state is None:
            self._constant_state = self._read_state()
        return self._constant_state

    def _read_state(self) -> SamplingState:
        generator = self._generator.state
        inner = cast("Mapping[str, int]", generator["state"])
        position = (inner["state"], inner["inc"], int(generator["has_uint32"]), int(generator["uinteger"]))
        return SamplingState(self.seed, position, self._draw.mu if isinstance(self._draw, Mirostat) else None)

    def _resume(self, state: SamplingState) -> None:
        value, increment, has_uint32, uinteger = state.position
        self._generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": value, "inc": increment},
            "has_uint32": has_uint32,
            "uinteger": uinteger,
        }
        if isinstance(self._draw, Mirostat) and state.mu is not None:
            self._draw.mu = state.mu


def log_probabilities(logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the `n_top` most likely ones, by the softmax of the logits.

    Args:
        logits: shape (n_vocab,), at least one of them finite.
    """
    top = float(logits.max())
    total = top + float(np.log(np.exp(logits - np.float32(top), dtype=np.float64).sum()))
    ids = top_k(logits, n_top).positions if n_top else np.empty(0, np.intp)
    return TokenLogprobs(
        token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in ids)
    )
