"""What all sequences of a model share: the cache, how the model computes, what is saved, and who draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import Cache, Match, Policy, namespace_key
from erllama.engine.adapters import Adapters, AdapterSet, named
from erllama.engine.backend import Backend
from erllama.engine.grammar.grammar import GrammarCompiler
from erllama.engine.grammar.matcher import Matcher
from erllama.engine.grammar.triggers import LazyMatcher
from erllama.engine.kv.slices import Slicing
from erllama.engine.kv.weights import Weights
from erllama.engine.output.constraint import PhasedMatcher
from erllama.engine.output.phases import PhaseTracker, Script, opening_tokens
from erllama.engine.requests.request import RequestOptions
from erllama.engine.sampling.sampler import SamplerFactory
from erllama.errors import OptionError, PromptError

log = logger("erllama.engine")

Constraint = Matcher | LazyMatcher | PhasedMatcher


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What all sequences of a model share: the cache, how the model computes, what is saved, and who draws."""

    cache: Cache
    backend: Backend
    slicing: Slicing
    policy: Policy
    samplers: SamplerFactory
    grammars: GrammarCompiler
    script: Script
    adapters: Adapters
    weights: Weights

    @classmethod
    def of(cls, cache: Cache, backend: Backend, policy: Policy) -> ModelContext:
        """Of one model."""
        limits, vocabulary = backend.limits, backend.vocabulary
        slicing = Slicing(
            min(limits.n_ubatch, limits.n_batch),
            cache.block_size,
            at_blocks=not limits.can_trim,
            # Of a block longer than the window only its end is packed; restored, it lies in other cells, which
            # changes the order of sums. Windows of a block's length and more were found to keep every bit.
            restores_bits=not 0 < limits.attention_window < cache.block_size,
        )
        samplers = SamplerFactory(vocabulary, limits.n_ctx)
        grammars, script = GrammarCompiler(vocabulary), Script(vocabulary)
        return cls(cache, backend, slicing, policy, samplers, grammars, script, Adapters(backend), Weights(backend))

    def stop_tokens(self, options: RequestOptions) -> dict[int, str]:
        """The tokens at which a reply ends, and the texts that are told of them.

        Raises:
            OptionError: an id is outside the vocabulary.
        """
        vocabulary = self.backend.vocabulary
        found: dict[int, str] = {}
        for token in options.stop_token_ids:
            if token >= vocabulary.n_tokens:
                raise OptionError(
                    f"stop_token_ids has {token}; ids of this model are 0 to {vocabulary.n_tokens - 1}"
                )
            found[token] = self.script.written(self.script.of_token(token)).decode("utf-8", "replace")
        for text in options.stop:
            try:
                script = self.script.of_text(text)
            except PromptError:  # a model without a tokenizer has no special tokens either
                continue
            if len(script) == 1 and not self.script.plain(script):
                found[self.script.token_of(script)] = text
        return found

    def tracker(self, options: RequestOptions, prompt: NDArray[np.int32]) -> PhaseTracker | None:
        """What tells the phases of a reply apart; None where they are not to be told."""
        return None if options.phases is None else PhaseTracker(options.phases, self.script, prompt)

    def grammar(self, options: RequestOptions, tracker: PhaseTracker | None) -> Constraint | None:
        """What keeps a reply to its grammars; None where none does."""
        phases, n_vocab = options.phases, self.backend.limits.n_vocab
        answer: Matcher | LazyMatcher | None = None
        if options.grammar is not None:
            matcher = answer = self.grammars.matcher(options.grammar)
            if options.grammar_triggers:
                most, last = (
                    max((id for id in options.grammar_triggers if isinstance(id, int)), default=0),
                    n_vocab - 1,
                )
                if most > last:
                    raise OptionError(f"grammar_triggers has token {most}; the vocabulary has 0 to {last}")
                answer = LazyMatcher(matcher, self.backend.vocabulary, options.grammar_triggers)
        if phases is None or tracker is None:
            return answer
        calls = None if phases.call_grammar is None else self.grammars.matcher(phases.call_grammar)
        if phases.calls_only:
            answer, calls = calls, None
        if answer is None and calls is None:
            return None
        openings = opening_tokens(phases, self.script, calls=calls is not None)
        close = phases.thinking.close[:1] if phases.thinking is not None else ()
        closing = [token for text in close for token in self.script.tokens_of(text)]
        return PhasedMatcher(
            tracker,
            self.script,
            answer,
            calls,
            openings,
            closing,
            n_vocab,
            answer_is_text=not phases.calls_only,
        )

    def namespace(self, cache_salt: str | None, adapters: AdapterSet) -> bytes:
        """The root key of what a request may see: the model's, or a tenant's; another for each set of adapters."""
        parts = dict(self.backend.namespace)
        if cache_salt is not None:
            parts["cache_salt"] = cache_salt
        if adapters:
            parts["adapters"] = named(adapters)
        return namespace_key(parts)

    def awaits(self, key: bytes) -> bool:
        """Whether a block is being saved just now."""
        try:
            return self.cache.awaits(key)
        except BaseException:
            self.fault("asking for a save in flight")
            return False

    def fault(self, what: str) -> None:
        """In an `except`: a request never fails for the cache, not even for a mistake in it."""
        log.exception("%s failed", what)
        try:
            self.cache.count_fault()
        except BaseException:
            log.exception("counting that failed, too")

    def find(self, namespace: bytes, tokens: NDArray[np.int32], parent_key: bytes | None) -> Match | None:
        """What the cache has of `tokens`; None where it fails, or may not be used. The caller releases it."""
        if not self.weights.intact():
            return None
        try:
            return self.cache.lookup(
                namespace,
                tokens,
                whole=not self.backend.limits.can_trim,
                loadable=True,
                parent_key=parent_key,
                count=False,
            )
        except BaseException:
            self.fault(f"looking up {len(tokens)} tokens of a prompt, which is read cold,")
            return None
