"""The sampling options of a request, checked when they are made.

The steps of the chain and mirostat declare most of the options in their classes. This module derives the fields of
`SamplingOptions` and their checks from the declarations, and adds the options that belong to no step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING

import numpy as np

from erllama.checks import choice, integer, real
from erllama.engine.sampling.declaration import HasOptions, Option, Step
from erllama.engine.sampling.draws import Mirostat
from erllama.engine.sampling.steps import CHAIN, Temperature
from erllama.errors import OptionError

_MAX_BIAS = 1e30  # float32 holds larger numbers, but not sums of them
_MAX_SEED = 2**64 - 1

# The names of the steps, in the default order.
SAMPLERS = tuple(step.name for step in CHAIN)
# Every declared option by name: those of the chain, then those of mirostat.
_OWNERS: tuple[type[HasOptions], ...] = (*CHAIN, Mirostat)
DECLARED = {option.name: option for owner in _OWNERS for option in owner.declared_options()}

if TYPE_CHECKING:

    class _DeclaredOptions:
        """The fields that the steps and mirostat declare."""

else:
    # Only `temperature` may be positional: the order of the others is that of the chain.
    _DeclaredOptions = make_dataclass(
        "_DeclaredOptions",
        [
            (
                name,
                type(option.default),
                field(default=option.default, kw_only=option is not Temperature.temperature),
            )
            for name, option in DECLARED.items()
        ],
        frozen=True,
        slots=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(_DeclaredOptions):
    """How a request draws its tokens.

    Has a field for every option of a step and of mirostat besides the attributes below, for example `temperature`,
    `top_k` and `mirostat_tau`. The page on sampling lists them with their defaults. The step classes in
    `erllama.engine.sampling.steps` declare them and name the papers.

    Attributes:
        seed: fixes the draws, 0 to 2**64 - 1; None draws a seed.
        logit_bias: by token id, the number that is added to the token's logit; -inf excludes the token.
        banned_tokens: ids that are never drawn.
        samplers: the steps in their order: names, and functions from `Candidates` to `Candidates`.

    Raises:
        OptionError: an option has a wrong type or value, or has no effect beside the others.
    """

    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    banned_tokens: Sequence[int] = ()
    samplers: Sequence[str | Step] = SAMPLERS

    if TYPE_CHECKING:

        def __init__(self, temperature: float = ..., **options: object) -> None: ...

    def __post_init__(self) -> None:
        for name, option in DECLARED.items():
            self._put(name, option.checked(getattr(self, name)))
        if self.seed is not None:
            self._put("seed", integer("seed", self.seed, 0, _MAX_SEED))
        self._put("logit_bias", _check_biases(self.logit_bias))
        self._put("banned_tokens", _check_tokens(self.banned_tokens))
        self._put("samplers", _check_samplers(self.samplers))
        self._check_combination()

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token that remains is taken."""
        return Temperature.temperature.of(self) == 0

    def _check_combination(self) -> None:
        """Raise OptionError for an option that would have no effect beside the others."""
        mirostat = Mirostat.mirostat.of(self)
        spread = Temperature.dynatemp_range.of(self)
        if self.greedy and spread > 0:
            raise OptionError(
                f"temperature=0 takes the most likely token, so dynatemp_range={spread:g} has no effect; "
                "leave out one of them"
            )
        if mirostat and (self.greedy or self.samplers != SAMPLERS):
            other = "temperature=0" if self.greedy else "samplers"
            raise OptionError(f"mirostat={mirostat} draws by its own algorithm; leave out {other}, or mirostat")
        for step in CHAIN:
            reason = None
            if step.name not in self.samplers:
                reason = f"{step.name!r} is not among samplers={self.samplers!r}"
            elif mirostat and step.drops_candidates:
                reason = f"mirostat={mirostat} replaces this step"
            if reason is not None:
                _check_neutral(self, step.declared_options(), reason)


def _check_neutral(options: SamplingOptions, declared: Sequence[Option[object]], reason: str) -> None:
    for option in declared:
        if not option.shared and not option.is_neutral(options):
            raise OptionError(f"{option.name}={option.of(options)!r} has no effect: {reason}")


def _check_biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias={value!r}; pass a mapping of token ids to numbers")
    biases = {}
    for token, bias in value.items():
        # OpenAI's clients write JSON, where keys are strings.
        token = int(token) if isinstance(token, str) and token.isdecimal() else token
        name = f"logit_bias[{token!r}]"
        number = -math.inf if bias == -math.inf else real(name, bias, -_MAX_BIAS, _MAX_BIAS)
        biases[integer("a key of logit_bias", token, 0)] = number
    return biases


def _check_tokens(value: object) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | set | frozenset | np.ndarray):
        raise OptionError(f"banned_tokens={value!r}; pass a list of token ids")
    return tuple(sorted({integer("each of banned_tokens", token, 0) for token in value}))


def _check_samplers(value: object) -> tuple[str | Step, ...]:
    if not isinstance(value, list | tuple):
        raise OptionError(f"samplers={value!r}; pass a list of {', '.join(map(repr, SAMPLERS))} and functions")
    return tuple(step if callable(step) else choice("each of samplers", step, SAMPLERS) for step in value)
