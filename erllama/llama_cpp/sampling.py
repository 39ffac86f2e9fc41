"""The sampling options of llama-cpp-python as options of `Model.complete`, and its callbacks as sampler steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from erllama.checks import integer, real, shown
from erllama.engine import Candidates
from erllama.errors import OptionError
from erllama.llama_cpp.constants import LLAMA_DEFAULT_SEED
from erllama.llama_cpp.llama_grammar import LlamaGrammar

LogitsProcessor = Callable[[NDArray[np.intc], NDArray[np.single]], NDArray[np.single]]
StoppingCriteria = Callable[[NDArray[np.intc], NDArray[np.single]], bool]
# The order of llama-cpp-python's chain.
_STEPS = ("penalties", "top_k", "typical_p", "top_p", "min_p", "temperature")


class LogitsProcessorList(list[LogitsProcessor]):
    """Functions that change the logits of the next token, one after another."""

    def __call__(self, input_ids: NDArray[np.intc], scores: NDArray[np.single]) -> NDArray[np.single]:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Functions that end a reply, as soon as one of them returns True."""

    def __call__(self, input_ids: NDArray[np.intc], logits: NDArray[np.single]) -> bool:
        return any(criterion(input_ids, logits) for criterion in self)


class MinTokensLogitsProcessor:
    """Excludes a token, such as the end token, from the first `min_tokens` tokens of a reply."""

    def __init__(self, min_tokens: int, token_eos: int) -> None:
        self.min_tokens, self.token_eos = min_tokens, token_eos
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: NDArray[np.intc], scores: NDArray[np.single]) -> NDArray[np.single]:
        if self.prompt_tokens is None:
            self.prompt_tokens = len(input_ids)
        if len(input_ids) - self.prompt_tokens < self.min_tokens:
            scores[self.token_eos] = -np.inf
        return scores


class SamplingArguments(TypedDict, total=False):
    """The arguments that all generating methods of `Llama` share, under the names of `Llama.generate`."""

    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    temp: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    tfs_z: float
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    penalize_nl: bool
    logits_processor: LogitsProcessorList | LogitsProcessor | None
    stopping_criteria: StoppingCriteriaList | StoppingCriteria | None
    grammar: LlamaGrammar | None
    logit_bias: dict[int, float] | None


class StopWatch:
    """Evaluates stopping criteria, in the model's thread, before each token of one reply is sampled.

    Attributes:
        stop_at: number of tokens of prompt and reply at which the reply ends; None if no criterion was met.
    """

    def __init__(self, criteria: StoppingCriteria, n_vocab: int) -> None:
        self._criteria, self._n_vocab = criteria, n_vocab
        self.stop_at: int | None = None

    def step(self, candidates: Candidates) -> Candidates:
        """Return the candidates unchanged."""
        n_tokens = len(candidates.context)
        met = self.stop_at is None and self._criteria(candidates.context, _row(candidates, self._n_vocab))
        if met:
            self.stop_at = n_tokens
        return candidates


def sampling_options(
    n_vocab: int, last_n: int, watch: StopWatch | None, **arguments: Unpack[SamplingArguments]
) -> dict[str, Any]:
    """Return options of `Model.complete`, without a seed.

    Args:
        n_vocab: width of a row of logits.
        last_n: number of tokens to which the repeat penalty applies.
        watch: evaluates the stopping criteria.

    Raises:
        OptionError: an argument cannot be honoured.
    """
    if arguments.get("tfs_z", 1.0) != 1.0:
        raise OptionError(
            "tfs_z cannot be honoured: libllama removed tail-free sampling, and llama-cpp-python ignores it"
        )
    if not arguments.get("penalize_nl", True):
        raise OptionError(
            "penalize_nl=False cannot be honoured: penalties apply to all tokens, as in llama-cpp-python"
        )
    options: dict[str, Any] = {
        "repeat_last_n": last_n,
        "repeat_penalty": arguments.get("repeat_penalty", 1.0),
        "frequency_penalty": arguments.get("frequency_penalty", 0.0),
        "presence_penalty": arguments.get("presence_penalty", 0.0),
        "logit_bias": arguments.get("logit_bias"),
    }
    grammar = arguments.get("grammar")
    if grammar is not None:
        if not isinstance(grammar, LlamaGrammar):
            raise OptionError(f"grammar={shown(grammar)}; pass a LlamaGrammar")
        options["grammar"] = grammar.grammar
    callbacks = _callbacks(n_vocab, watch, arguments.get("logits_processor"))
    temperature = real("temperature", arguments.get("temp", 0.8))
    if arguments.get("mirostat_mode") and temperature > 0:
        if callbacks:
            raise OptionError("mirostat_mode with logits_processor or stopping_criteria; leave one of them out")
        return options | _mirostat(arguments)
    if temperature < 0:  # llama-cpp-python samples from the whole distribution
        return options | {"samplers": (*callbacks, "penalties")}
    if temperature == 0:
        return options | {"samplers": (*callbacks, "penalties", "temperature"), "temperature": 0.0}
    return options | {
        "samplers": (*callbacks, *_STEPS),
        "temperature": temperature,
        "top_k": max(integer("top_k", arguments.get("top_k", 40)), 0),  # in libllama, 0 and less keep all
        "top_p": min(real("top_p", arguments.get("top_p", 0.95)), 1.0),
        "min_p": max(real("min_p", arguments.get("min_p", 0.05)), 0.0),
        "typical_p": min(real("typical_p", arguments.get("typical_p", 1.0)), 1.0),
    }


def _mirostat(arguments: SamplingArguments) -> dict[str, Any]:
    """Return the options of mirostat, which samples at temperature 1 as in llama-cpp-python."""
    return {
        "temperature": 1.0,
        "mirostat": arguments.get("mirostat_mode", 0),
        "mirostat_tau": arguments.get("mirostat_tau", 5.0),
        "mirostat_eta": arguments.get("mirostat_eta", 0.1),
    }


def seed_of(seed: int) -> int | None:
    """Return a seed of llama-cpp-python as erllama's: its lowest 32 bits; None for LLAMA_DEFAULT_SEED."""
    bits = integer("seed", seed) & 0xFFFFFFFF
    return None if bits == LLAMA_DEFAULT_SEED else bits


def _callbacks(
    n_vocab: int, watch: StopWatch | None, processors: LogitsProcessorList | LogitsProcessor | None
) -> list[Callable[[Candidates], Candidates]]:
    steps: list[Callable[[Candidates], Candidates]] = [] if watch is None else [watch.step]
    if processors is None:
        return steps
    functions: Iterable[object] = processors if isinstance(processors, list | tuple) else [processors]
    for function in functions:
        if not callable(function):
            raise OptionError(f"logits_processor has {shown(function)}; pass functions")
        steps.append(_processor_step(function, n_vocab))
    return steps


def _processor_step(processor: LogitsProcessor, n_vocab: int) -> Callable[[Candidates], Candidates]:
    def step(candidates: Candidates) -> Candidates:
        changed = np.asarray(processor(candidates.context, _row(candidates, n_vocab)), np.float32)
        if changed.shape != (n_vocab,):
            raise OptionError(f"a logits_processor returned shape {changed.shape}; return {n_vocab} logits")
        return candidates.with_logits(changed[candidates.ids])

    return step


def _row(candidates: Candidates, n_vocab: int) -> NDArray[np.float32]:
    """Return the logits of the whole vocabulary, shape (n_vocab,), which the caller may change."""
    row = np.full(n_vocab, -np.inf, np.float32)
    row[candidates.ids] = candidates.logits
    return row
