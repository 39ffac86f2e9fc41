"""The objects that all sequences of a model share: prefix cache, samplers, grammars and adapters.

`ModelThread` makes one `ModelContext` per model. It is immutable. Callers' threads use it to make a `Sequence`,
the model thread to run it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erllama.cache import Cache, Policy
from erllama.engine.adapters import Adapters
from erllama.engine.backend import Backend, RowSelector
from erllama.engine.grammar.grammar import GrammarCompiler
from erllama.engine.grammar.matcher import Matcher
from erllama.engine.grammar.triggers import LazyMatcher
from erllama.engine.kv.prefix_cache import PrefixCache
from erllama.engine.output.constraint import PhasedMatcher
from erllama.engine.output.phases import PhaseTracker, opening_tokens
from erllama.engine.output.token_codec import TokenCodec
from erllama.engine.requests.request import RequestOptions
from erllama.engine.sampling.sampler import SamplerFactory
from erllama.errors import OptionError, PromptError

Constraint = Matcher | LazyMatcher | PhasedMatcher


@dataclass(frozen=True, slots=True)
class ModelContext:
    """The objects that all sequences of a model share.

    Attributes:
        backend: the model.
        prefix_cache: the cache as this model uses it.
        samplers: makes samplers.
        grammars: compiles grammars.
        codec: encodes tokens, so that markers are found across them.
        adapters: the model's adapters.
    """

    backend: Backend
    prefix_cache: PrefixCache
    samplers: SamplerFactory
    grammars: GrammarCompiler
    codec: TokenCodec
    adapters: Adapters

    @classmethod
    def of(cls, cache: Cache, backend: Backend, policy: Policy) -> ModelContext:
        """Return the context of one model."""
        vocabulary = backend.vocabulary
        return cls(
            backend,
            PrefixCache.of(cache, backend, policy),
            SamplerFactory(vocabulary, backend.limits.n_ctx),
            GrammarCompiler(vocabulary),
            TokenCodec(vocabulary),
            Adapters(backend),
        )

    @property
    def selector(self) -> RowSelector | None:
        """What selects the largest logits of rows; None for numpy."""
        return self.backend if isinstance(self.backend, RowSelector) else None

    @property
    def ending_tokens(self) -> frozenset[int]:
        """The tokens that end generation."""
        return frozenset(np.flatnonzero(self.backend.vocabulary.is_eog).tolist())

    def stop_tokens(self, options: RequestOptions) -> dict[int, str]:
        """Return the tokens at which a reply ends, each with the text that `stop_sequence` reports.

        Raises:
            OptionError: an id is outside the vocabulary.
        """
        vocabulary, codec = self.backend.vocabulary, self.codec
        found: dict[int, str] = {}
        for token in options.stop_token_ids:
            if token >= vocabulary.n_tokens:
                raise OptionError(
                    f"stop_token_ids has {token}; ids of this model are 0 to {vocabulary.n_tokens - 1}"
                )
            found[token] = codec.decode(codec.encode_token(token)).decode("utf-8", "replace")
        for text in options.stop:
            try:
                encoded = codec.encode_text(text)
            except PromptError:  # a model without a tokenizer has no special tokens either
                continue
            if len(encoded) == 1 and not codec.text_bytes(encoded):
                found[codec.special_token(encoded)] = text
        return found

    def tracker(self, options: RequestOptions, prompt: NDArray[np.int32]) -> PhaseTracker | None:
        """Return a tracker of the reply's phases; None if the reply is all text."""
        return None if options.phases is None else PhaseTracker(options.phases, self.codec, prompt)

    def grammar(self, options: RequestOptions, tracker: PhaseTracker | None) -> Constraint | None:
        """Return the matcher that constrains the reply; None if it is unconstrained."""
        phases, answer = options.phases, self._answer_matcher(options)
        if phases is None or tracker is None:
            return answer
        calls = None if phases.call_grammar is None else self.grammars.matcher(phases.call_grammar)
        if phases.calls_only:
            answer, calls = calls, None
        if answer is None and calls is None:
            return None
        close = phases.thinking.close[:1] if phases.thinking is not None else ()
        return PhasedMatcher(
            tracker,
            self.codec,
            answer,
            calls,
            openings=opening_tokens(phases, self.codec, calls=calls is not None),
            closing=[token for text in close for token in self.codec.tokenize(text)],
            n_vocab=self.backend.limits.n_vocab,
            answer_is_text=not phases.calls_only,
        )

    def _answer_matcher(self, options: RequestOptions) -> Matcher | LazyMatcher | None:
        if options.grammar is None:
            return None
        matcher = self.grammars.matcher(options.grammar)
        if not options.grammar_triggers:
            return matcher
        last = self.backend.limits.n_vocab - 1
        largest = max((id for id in options.grammar_triggers if isinstance(id, int)), default=0)
        if largest > last:
            raise OptionError(f"grammar_triggers has token {largest}; the vocabulary has 0 to {last}")
        return LazyMatcher(matcher, self.backend.vocabulary, options.grammar_triggers)
