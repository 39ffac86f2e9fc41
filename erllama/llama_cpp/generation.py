"""Token by token: what `Llama.generate` and `Llama.sample` run, and the state that they share with `Llama.eval`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from erllama._model.model import Model
from erllama.checks import integer, shown
from erllama.engine import Done, TextDelta
from erllama.errors import OptionError, PromptError, PromptTooLong, Unsupported, VocabularyOnly
from erllama.llama_cpp.sampling import SamplingArguments, StoppingCriteriaList, StopWatch, sampling_options, seed_of

# Tokens of the first request of a generator, and of the longest one. The model computes ahead of a program that
# reads slowly, so a request has few tokens at first.
_FIRST, _LONGEST = 8, 64


class LlamaState:
    """The tokens of a `Llama` and its seed, to return to later. Can be pickled.

    The KV of the tokens is in erllama's cache, and not part of the state. KV that was evicted is computed again.

    Attributes:
        input_ids: the tokens, shape (n_tokens,).
        n_tokens: number of tokens.
        seed: the seed of the sampling.
    """

    def __init__(self, input_ids: NDArray[np.intc], n_tokens: int, seed: int) -> None:
        self.input_ids, self.n_tokens, self.seed = input_ids, n_tokens, seed


def end_tokens(model: Model) -> list[int]:
    """Return the ids of the tokens that end a reply."""
    found: list[int] = np.flatnonzero(model._vocabulary.is_eog).tolist()
    return found


def next_token(model: Model, tokens: Sequence[int], options: dict[str, Any], eos: int) -> int:
    """Sample the token that follows some tokens."""
    completion = model.complete(tokens, max_tokens=1, stop_token_ids=end_tokens(model), **options)
    if completion.tokens:
        return completion.tokens[0]
    return eos if completion.stop_token is None else completion.stop_token


class TokenGenerator:
    """Generates tokens after a prompt, across ends of replies, until the context is full.

    Args:
        options: options of `Model.stream`, without a seed.
        seed: seed of the sampling; None for a random one.
        watch: the stopping criteria; None without any.
        eos: the token that is yielded if a grammar ends a reply.
        on_token: called with the tokens before each yielded one.
    """

    def __init__(
        self,
        model: Model,
        options: dict[str, Any],
        seed: int | None,
        watch: StopWatch | None,
        eos: int,
        on_token: Callable[[Sequence[int]], None],
    ) -> None:
        self._model, self._options, self._watch = model, options, watch
        self._seed = seed
        self._eos, self._on_token = eos, on_token
        self._ends = end_tokens(model)
        self._draws: dict[str, Any] = {"seed": seed}

    def run(self, tokens: list[int]) -> Generator[int, Sequence[int] | None, None]:
        """Yield tokens. Tokens that are sent follow the yielded one."""
        n_most = _FIRST if "grammar" not in self._options else None  # a grammar spans one request
        while len(tokens) < self._model.n_ctx:
            n_room, n_before = self._model.n_ctx - len(tokens), len(tokens)
            ended = yield from self._request(tokens, min(n_most or n_room, n_room))
            if len(tokens) == n_before or (ended and "grammar" in self._options):
                return
            if self._watch is not None and self._watch.stop_at is not None:
                return
            n_most = min(2 * n_most, _LONGEST) if n_most else None

    def _request(self, tokens: list[int], n_most: int) -> Generator[int, Sequence[int] | None, bool]:
        """Run one request, append its tokens to `tokens`, and return whether the reply ended by itself."""
        options = {**self._options, **self._draws, "max_tokens": n_most, "stop_token_ids": self._ends}
        n_before = len(tokens)
        with self._model.stream(tokens, **options) as stream:
            for event in stream:
                if isinstance(event, TextDelta):
                    for token in event.tokens:
                        if (yield from self._one(tokens, token)):
                            return False
                elif isinstance(event, Done):
                    completion = event.completion
                    self._draws = {"sampling_state": completion.sampling_state}
                    # A delta has no token that ends the reply without being a part of its text.
                    for token in completion.tokens[len(tokens) - n_before :]:
                        if (yield from self._one(tokens, token)):
                            return False
                    if completion.finish_reason != "stop":
                        return False
                    if not completion.tokens or completion.stop_token != tokens[-1]:
                        end = self._eos if completion.stop_token is None else completion.stop_token
                        yield from self._one(tokens, end)
                    return True
        return False

    def _one(self, tokens: list[int], token: int) -> Generator[int, Sequence[int] | None, bool]:
        """Yield one token; return whether the request must end, because tokens were sent or a criterion was met."""
        if self._watch is not None and self._watch.stop_at is not None and len(tokens) >= self._watch.stop_at:
            return True
        self._on_token(tokens)
        sent = yield token
        tokens.append(token)
        if not sent:
            return False
        if "grammar" in self._options:
            raise OptionError("tokens were sent to a generator with a grammar, which they may not match")
        tokens += map(int, sent)
        # The model may have drawn ahead. A new seed, which depends on the position alone, keeps runs reproducible.
        self._draws = {"seed": None if self._seed is None else (self._seed + len(tokens)) & 0xFFFFFFFF}
        return True


class TokenLevel:
    """The part of `Llama` that works token by token. Its state is the tokens so far; their KV is in the cache.

    Attributes:
        last_n_tokens_size: number of tokens to which penalties apply.
    """

    last_n_tokens_size: int
    _model: Model
    _seed: int
    _speculation: dict[str, Any]
    _tokens: list[int]

    def eval(self, tokens: Sequence[int]) -> None:
        """Compute tokens after the present ones.

        Raises:
            PromptTooLong: they do not fit the context.
        """
        if len(tokens):
            whole = [*self._tokens, *map(int, tokens)]
            self._check_room(whole)
            self._model.prefill(whole)
            self._tokens = whole

    def sample(self, *, idx: int | None = None, **arguments: Unpack[SamplingArguments]) -> int:
        """Return a token that may follow the present ones; arguments as for `generate`.

        Args:
            idx: position of the last token to consider. None for the last one.
        """
        tokens = self._tokens if idx is None else self._tokens[: idx + 1]
        if not tokens:
            raise PromptError("there are no tokens to continue; call eval first")
        options = self._sampling(arguments)[1]
        return next_token(self._model, tokens, {**options, "seed": seed_of(self._seed)}, self.token_eos())

    def generate(
        self, tokens: Sequence[int], reset: bool = True, **arguments: Unpack[SamplingArguments]
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield tokens that follow, also after the end of a reply, until the context is full.

        The model computes up to 64 tokens ahead of the program. Tokens that are sent to the generator follow the
        yielded token.

        Args:
            tokens: the prompt.
            reset: start with the prompt. False to append it to the present tokens.
            temp: the temperature.
            penalize_nl: only True.

        Other arguments as for `create_completion`.
        """
        watch, options = self._sampling(arguments)
        whole = [int(token) for token in tokens] if reset else [*self._tokens, *map(int, tokens)]
        self._check_room(whole)
        generator = TokenGenerator(
            self._model, options, seed_of(self._seed), watch, self.token_eos(), self._set_tokens
        )
        return generator.run(whole)

    def reset(self) -> None:
        """Forget the present tokens. Their KV stays in the cache."""
        self._tokens = []

    def set_seed(self, seed: int) -> None:
        """Set the seed from which completions without a seed derive theirs."""
        self._seed = integer("seed", seed)

    def save_state(self) -> LlamaState:
        """Return the present tokens and the seed."""
        return LlamaState(self.input_ids, self.n_tokens, self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Return to the tokens and the seed of `save_state`."""
        self._tokens = [int(token) for token in state.input_ids[: state.n_tokens]]
        self._seed = state.seed

    @property
    def n_tokens(self) -> int:
        """Number of the present tokens. A smaller number drops the last ones."""
        return len(self._tokens)

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        self._tokens = self._tokens[: integer("n_tokens", n, 0, len(self._tokens))]

    @property
    def input_ids(self) -> NDArray[np.intc]:
        """The present tokens, shape (n_tokens,)."""
        return np.array(self._tokens, np.intc)

    @property
    def eval_tokens(self) -> deque[int]:
        """The present tokens."""
        return deque(self._tokens, maxlen=self._model.n_ctx)

    @property
    def scores(self) -> object:
        """Not available."""
        raise Unsupported(
            "logits are not kept; use logprobs=, a logits_processor, or erllama_model.score for log-probabilities"
        )

    eval_logits = scores

    def token_eos(self) -> int:
        """Return the id of the token that ends a text; -1 without one."""
        raise NotImplementedError

    def _set_tokens(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def _check_room(self, ids: Sequence[int]) -> None:
        n_ctx = self._model.n_ctx
        if not n_ctx:
            raise VocabularyOnly("a model with vocab_only has no weights; load it without vocab_only")
        if len(ids) >= n_ctx:
            message = f"Requested tokens ({len(ids)}) exceed context window of {n_ctx}"
            raise PromptTooLong(
                f"{message}; shorten the prompt, or pass a larger n_ctx", n_tokens=len(ids), n_ctx=n_ctx
            )

    def _sampling(self, arguments: SamplingArguments) -> tuple[StopWatch | None, dict[str, Any]]:
        """Return what evaluates the stopping criteria, and the options of `Model.complete`, without a seed."""
        criteria: object = arguments.get("stopping_criteria")
        n_vocab = self._model.n_vocab
        if isinstance(criteria, list):
            criteria = StoppingCriteriaList(criteria) if criteria else None
        if criteria is not None and not callable(criteria):
            raise OptionError(f"stopping_criteria={shown(criteria)}; pass functions of token ids and logits")
        watch = None if criteria is None else StopWatch(criteria, n_vocab)
        options = sampling_options(n_vocab, self.last_n_tokens_size, watch, **arguments)
        return watch, options | self._speculation
