"""From a row of logits to a token: a chain of steps, built once per request, and a draw.

By default the steps come in llama.cpp's order. Candidates are kept in order of
falling logits, ties by rising id, so that equal logits give equal tokens.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from erllama.checks import choice, encodable, integer, real
from erllama.engine.backend import Vocabulary
from erllama.engine.sampling.candidates import Candidates, masked, top_k
from erllama.engine.sampling.dry import DRY, Breakers
from erllama.engine.sampling.steps import (
    XTC,
    Chance,
    DynamicTemperature,
    Greedy,
    LogitBias,
    MinP,
    Mirostat,
    Penalties,
    Step,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    TypicalP,
)
from erllama.errors import OptionError, SamplingError

_MOST_BIAS = 1e30  # float32 has room for more, but not for sums of it
_MAX_SEED = 2**64 - 1
_MOST_BREAKERS = 8  # sets of them that are kept
_MOST_TEXTS = 64  # of one set

_NARROWING = ("top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc")
SAMPLERS = ("penalties", "dry", *_NARROWING, "temperature")

# Values that ask for no step, where the default asks for one.
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

# Which options a step of the chain has, beside `min_keep`.
_OF_STEP = {
    "penalties": ("repeat_penalty", "repeat_last_n", "frequency_penalty", "presence_penalty"),
    "dry": (
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
    ),
    "top_n_sigma": ("top_n_sigma",),
    "top_k": ("top_k",),
    "typical_p": ("typical_p",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "xtc": ("xtc_probability", "xtc_threshold"),
    "temperature": ("temperature", "dynatemp_range", "dynatemp_exponent"),
}


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are drawn. The classes of the steps, in `erllama.engine.sampling.steps`, name their sources.

    Attributes:
        temperature: 0 takes the most likely token; higher is more random.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the fewest most likely whose probabilities sum to this; 1 keeps all.
        min_p: keep those at least this times as likely as the most likely; 0 keeps all.
        seed: fixes the draws, 0 to 2**64 - 1; None draws one.
        logit_bias: by token id, what is added to its logit; -inf rules it out.
        banned_tokens: ids that are never drawn.
        repeat_penalty: tokens of the last `repeat_last_n` have their logits divided by this, those below 0
            multiplied; 1 does nothing.
        repeat_last_n: how many tokens of prompt and reply the penalties look at; -1 for all.
        frequency_penalty: taken from a token's logit for each time it is among those, -100 to 100.
        presence_penalty: taken from it if it is among those at all, -100 to 100.
        dry_multiplier: of the penalty for going on with a repetition; 0 for none.
        dry_base: how much larger the penalty is for each token by which the repetition is longer; at least 1.
        dry_allowed_length: tokens that may repeat.
        dry_penalty_last_n: how many tokens of prompt and reply are looked at for repetitions; -1 for all.
        dry_sequence_breakers: texts at which a repetition does not count on.
        top_n_sigma: keep logits within this many standard deviations of the largest; 0 keeps all.
        typical_p: keep those of typical surprise, up to this probability; 1 keeps all.
        xtc_probability: the chance that the most likely are dropped; 0 for never.
        xtc_threshold: how likely they must be to be dropped, all but the least likely of them, up to 0.5.
        dynatemp_range: the temperature goes this far up and down, by how uncertain the model is; 0 for not at all.
        dynatemp_exponent: how the uncertainty is bent, to favour high or low temperatures.
        mirostat: 1 or 2 draws by this algorithm in place of the steps that drop tokens; 0 does not.
        mirostat_tau: the surprise of a token that mirostat aims at, in bits.
        mirostat_eta: how fast it learns.
        min_keep: the fewest candidates that top_p, min_p, typical_p and xtc leave.
        samplers: the steps and their order: names, and functions from `Candidates` to `Candidates`.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    banned_tokens: Sequence[int] = ()
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    top_n_sigma: float = 0.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    min_keep: int = 0
    samplers: Sequence[str | Step] = SAMPLERS

    def __post_init__(self) -> None:
        limits: dict[str, tuple[Callable[..., object], float | None, float | None]] = {
            "temperature": (real, 0.0, None),
            "top_k": (integer, 0, None),
            "top_p": (real, 0.0, 1.0),
            "min_p": (real, 0.0, 1.0),
            "repeat_penalty": (real, 1e-3, 1e3),
            "repeat_last_n": (integer, -1, None),
            "frequency_penalty": (real, -100.0, 100.0),
            "presence_penalty": (real, -100.0, 100.0),
            "dry_multiplier": (real, 0.0, 1e6),
            "dry_base": (real, 1.0, 1e6),
            "dry_allowed_length": (integer, 0, None),
            "dry_penalty_last_n": (integer, -1, None),
            "top_n_sigma": (real, 0.0, None),
            "typical_p": (real, 0.0, 1.0),
            "xtc_probability": (real, 0.0, 1.0),
            "xtc_threshold": (real, 0.0, 0.5),
            "dynatemp_range": (real, 0.0, None),
            "dynatemp_exponent": (real, 0.0, None),
            "mirostat": (integer, 0, 2),
            "mirostat_tau": (real, 0.0, None),
            "mirostat_eta": (real, 0.0, 1.0),
            "min_keep": (integer, 0, None),
        }
        for name, (check, minimum, maximum) in limits.items():
            self._put(name, check(name, getattr(self, name), minimum, maximum))
        if self.seed is not None:
            self._put("seed", integer("seed", self.seed, 0, _MAX_SEED))
        self._put("logit_bias", _biases(self.logit_bias))
        self._put("banned_tokens", _banned(self.banned_tokens))
        self._put("dry_sequence_breakers", _breakers(self.dry_sequence_breakers))
        self._put("samplers", _samplers(self.samplers))
        self._check_together()

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        """Options that would do nothing beside others are mistakes."""
        if self.temperature == 0 and self.dynatemp_range > 0:
            raise OptionError(
                f"temperature=0 takes the most likely token, and dynatemp_range={self.dynatemp_range:g} has no use"
            )
        if self.mirostat and (self.temperature == 0 or self.samplers != SAMPLERS):
            other = "temperature=0" if self.temperature == 0 else "samplers"
            raise OptionError(f"mirostat={self.mirostat} draws in a way of its own; leave out {other}, or mirostat")
        defaults = {field.name: field.default for field in fields(self)}
        for step, names in _OF_STEP.items():
            instead = None
            if step not in self.samplers:
                instead = f"{step!r} is not among samplers={self.samplers!r}"
            elif self.mirostat and step in _NARROWING:
                instead = f"mirostat={self.mirostat} takes its place"
            for name in names:
                if instead is not None and getattr(self, name) not in (defaults[name], _NEUTRAL.get(name)):
                    raise OptionError(f"{name}={getattr(self, name)!r} has no effect: {instead}")


def _biases(given: object) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise OptionError(f"logit_bias={given!r}; give a mapping of token ids to numbers")
    found = {}
    for token, bias in given.items():
        # OpenAI's clients write JSON, where keys are texts.
        token = int(token) if isinstance(token, str) and token.isdecimal() else token
        name = f"logit_bias[{token!r}]"
        number = -math.inf if bias == -math.inf else real(name, bias, -_MOST_BIAS, _MOST_BIAS)
        found[integer("a key of logit_bias", token, 0)] = number
    return found


def _banned(given: object) -> tuple[int, ...]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence | set | frozenset | np.ndarray):
        raise OptionError(f"banned_tokens={given!r}; give a list of token ids")
    return tuple(sorted({integer("each of banned_tokens", token, 0) for token in given}))


def _breakers(given: object) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) and text for text in given):
        raise OptionError(f"dry_sequence_breakers={given!r}; give a list of texts, none of them empty")
    if len(given) > _MOST_TEXTS:
        raise OptionError(f"{len(given)} dry_sequence_breakers; give at most {_MOST_TEXTS}")
    return tuple(encodable("dry_sequence_breakers", text) for text in given)


def _samplers(given: object) -> tuple[str | Step, ...]:
    if not isinstance(given, list | tuple):
        raise OptionError(f"samplers={given!r}; give a list of {', '.join(map(repr, SAMPLERS))} and functions")
    return tuple(step if callable(step) else choice("each of samplers", step, SAMPLERS) for step in given)


class TokenLogprobs(NamedTuple):
    """How likely the model found a token, as natural logarithms of probabilities, before any sampling step.

    `top` has the most likely ids and theirs, most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SamplingState:
    """Where the draws of a reply stand, so that another request can go on from there.

    Attributes:
        seed: of the first of them.
        position: how far the seed's generator went, with what it holds back.
        mu: mirostat's; None without.
    """

    seed: int
    position: tuple[int, int, int, int]
    mu: float | None = None


class SamplerFactory:
    """Makes the samplers of one model's requests, and keeps what they can share.

    Args:
        vocabulary: the model's.
        n_ctx: tokens of its context.
    """

    def __init__(self, vocabulary: Vocabulary, n_ctx: int) -> None:
        self._vocabulary, self._n_ctx = vocabulary, n_ctx
        self._breakers: dict[tuple[str, ...], Breakers] = {}
        self._lock = threading.Lock()
        self._ids = np.arange(vocabulary.n_tokens)
        self._ids.flags.writeable = False

    def make(self, options: SamplingOptions, state: SamplingState | None = None) -> Sampler:
        """A sampler for one request.

        Args:
            state: where an earlier one's draws ended; None to begin anew.

        Raises:
            OptionError: an option names a token outside the vocabulary.
        """
        n_vocab = self._vocabulary.n_tokens
        biases = dict(options.logit_bias or {}) | dict.fromkeys(options.banned_tokens, -math.inf)
        if biases and max(biases) >= n_vocab:
            name = "banned_tokens" if max(biases) in options.banned_tokens else "logit_bias"
            raise OptionError(f"{name} has token {max(biases)}; the vocabulary has 0 to {n_vocab - 1}")
        steps: list[Step] = [LogitBias(biases)] if biases else []
        steps += [made for step in options.samplers if (made := self._step(step, options)) is not None]
        drawing: Greedy | Chance | Mirostat
        if options.mirostat:
            drawing = Mirostat(options.mirostat, options.mirostat_tau, options.mirostat_eta, n_vocab)
        else:
            drawing = Greedy() if options.temperature == 0 else Chance()
        return Sampler(options.seed, steps, drawing, self._ids, state)

    def _step(self, step: str | Step, options: SamplingOptions) -> Step | None:
        """One step of the chain; None where it would change nothing."""
        if not isinstance(step, str):
            return _Checked(step, self._vocabulary.n_tokens)
        if step in ("penalties", "dry"):
            return self._penalty(step, options)
        if options.mirostat:
            return _temperature(options) if step == "temperature" else None
        if options.temperature == 0 and step not in ("typical_p", "xtc"):
            return None  # the others leave the most likely, which is taken
        return _temperature(options) if step == "temperature" else _narrowing(step, options)

    def _penalty(self, step: str, options: SamplingOptions) -> Step | None:
        o = options
        if step == "penalties" and (o.repeat_penalty != 1 or o.frequency_penalty or o.presence_penalty):
            last_n = self._n_ctx if o.repeat_last_n < 0 else o.repeat_last_n
            return Penalties(last_n, o.repeat_penalty, o.frequency_penalty, o.presence_penalty) if last_n else None
        if step == "dry" and o.dry_multiplier:
            last_n = self._n_ctx if o.dry_penalty_last_n < 0 else o.dry_penalty_last_n
            breakers = self._breakers_of(tuple(o.dry_sequence_breakers))
            return DRY(o.dry_multiplier, o.dry_base, o.dry_allowed_length, last_n, breakers) if last_n else None
        return None

    def _breakers_of(self, texts: tuple[str, ...]) -> Breakers:
        with self._lock:
            found = self._breakers.pop(texts, None) or Breakers(self._vocabulary, texts)
            self._breakers[texts] = found  # used last, so the last to go
            if len(self._breakers) > _MOST_BREAKERS:
                del self._breakers[next(iter(self._breakers))]
            return found


def _narrowing(step: str, o: SamplingOptions) -> Step | None:
    if step == "top_n_sigma" and o.top_n_sigma > 0:
        return TopNSigma(o.top_n_sigma)
    if step == "top_k" and o.top_k:
        return TopK(o.top_k)
    if step == "typical_p" and o.typical_p < 1:
        return TypicalP(o.typical_p, o.min_keep)
    if step == "top_p" and o.top_p < 1:
        return TopP(o.top_p, o.min_keep)
    if step == "min_p" and o.min_p > 0:
        return MinP(o.min_p, o.min_keep)
    if step == "xtc" and o.xtc_probability > 0:
        return XTC(o.xtc_probability, o.xtc_threshold, o.min_keep)
    return None


def _temperature(o: SamplingOptions) -> Step | None:
    if o.dynatemp_range > 0:
        return DynamicTemperature(o.temperature, o.dynatemp_range, o.dynatemp_exponent)
    return Temperature(o.temperature) if o.temperature != 1 else None


class _Checked:
    """A step of the caller's own; what it gives is looked at before anything is drawn from it."""

    def __init__(self, step: Step, n_vocab: int) -> None:
        self._step, self._n_vocab = step, n_vocab

    def __call__(self, candidates: Candidates) -> Candidates:
        name = getattr(self._step, "__qualname__", type(self._step).__qualname__)
        try:
            found = self._step(candidates)
        except BaseException as error:
            raise SamplingError(f"the step {name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, Candidates):
            raise SamplingError(f"the step {name} gave {type(found).__name__}, not Candidates")
        ids, logits = np.asarray(found.ids), np.asarray(found.logits)
        if ids.ndim != 1 or ids.shape != logits.shape or not len(ids) or ids.dtype.kind not in "iu":
            raise SamplingError(f"the step {name} gave ids of shape {ids.shape} and logits of {logits.shape}")
        if ids.min() < 0 or ids.max() >= self._n_vocab:
            raise SamplingError(f"the step {name} gave a token outside 0 to {self._n_vocab - 1}")
        return Candidates(
            ids.astype(np.intp, copy=False),
            _checked(logits.astype(np.float32, copy=False), f"what the step {name} gave"),
            candidates.context,
            candidates.random,
            in_order=bool(found.in_order) and bool((logits[:-1] >= logits[1:]).all()),
        )


def _checked(logits: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    top = float(logits.max())  # NaN, if there is one
    if not math.isfinite(top):
        raise SamplingError(f"{what} leaves nothing to sample from: the largest logit is {top}")
    return logits


class Sampler:
    """Draws the tokens of one request.

    Args:
        seed: fixes the draws; None draws one.
        steps: narrow the candidates, in this order.
        drawing: chooses one of those that are left.
        ids: all of the vocabulary, intp, shape (n_vocab,).
        state: where an earlier one's draws ended.

    Attributes:
        seed: the one it uses.
    """

    def __init__(
        self,
        seed: int | None,
        steps: Sequence[Step],
        drawing: Greedy | Chance | Mirostat,
        ids: NDArray[np.intp],
        state: SamplingState | None = None,
    ) -> None:
        self._steps, self._drawing, self._ids = tuple(steps), drawing, ids
        self._only_the_best = not steps and isinstance(drawing, Greedy)
        if state is not None:
            seed = state.seed
        self.seed = secrets.randbits(64) if seed is None else seed
        self._generator = np.random.PCG64(self.seed)
        self._random = np.random.Generator(self._generator)
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
            logits: shape (n_vocab,); not changed. -inf rules a token out.
            context: prompt and reply so far, int32, shape (m,).
            allowed: shape (n_vocab,): what a grammar leaves; None for everything.

        Raises:
            SamplingError: a logit is NaN, or none is finite, or a step of the caller's own failed.
        """
        if self._only_the_best and allowed is None:
            best = int(logits.argmax())  # the first NaN, if there is one
            if not math.isfinite(logits[best]):
                _checked(logits, "the row of logits")
            return best
        _checked(logits, "the row of logits")
        if allowed is not None:
            logits = masked(logits, allowed)
            _checked(logits, "the grammar")
        candidates = Candidates(self._ids, logits, context, self._random)
        for step in self._steps:
            candidates = step(candidates)
        if not math.isfinite(candidates.best()):
            _checked(candidates.logits, "the chain")
        return self._drawing.draw(candidates)

    @property
    def state(self) -> SamplingState:
        """Where its draws stand."""
        found = self._generator.state
        inner = cast("Mapping[str, int]", found["state"])
        position = (inner["state"], inner["inc"], int(found["has_uint32"]), int(found["uinteger"]))
        return SamplingState(self.seed, position, self._drawing.mu if isinstance(self._drawing, Mirostat) else None)

    def _resume(self, state: SamplingState) -> None:
        at, step, has, held = state.position
        self._generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": at, "inc": step},
            "has_uint32": has,
            "uinteger": held,
        }
        if isinstance(self._drawing, Mirostat) and state.mu is not None:
            self._drawing.mu = state.mu


def log_probabilities(logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprobs:
    """How likely a token was, and the `n_top` most likely ones, by the softmax of the logits.

    Args:
        logits: shape (n_vocab,), at least one finite.
    """
    top = float(logits.max())
    total = top + float(np.log(np.exp(logits - np.float32(top), dtype=np.float64).sum()))
    ids = top_k(logits, n_top) if n_top else np.empty(0, np.intp)
    return TokenLogprobs(
        token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in ids)
    )
