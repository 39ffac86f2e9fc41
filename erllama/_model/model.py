"""What a user holds: a loaded model."""

from __future__ import annotations

import asyncio
import warnings
from _thread import start_new_thread
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from types import MappingProxyType
from typing import Never, Unpack

import numpy as np
from numpy.typing import NDArray

from erllama._model import registry as _registry
from erllama._model.adapters import AdapterMethods
from erllama._model.chat import ChatMethods
from erllama._model.embedding import EmbeddingMethods, Embeddings
from erllama._model.info import ModelInfo, Shape
from erllama._model.request_options import (
    CompletionOptions,
    PrefillOptions,
    request_options,
)
from erllama._model.requests import checked_ids
from erllama._model.scoring import Score, around_gap, with_continuation
from erllama._model.speculation import Verification, fixed
from erllama._model.streams import AsyncStream, Stream
from erllama._runtime.reentry import reentered
from erllama.cache import Cache, Policy
from erllama.checks import boolean, integer, reject_unknown, shown
from erllama.engine import (
    Backend,
    CacheHit,
    Completion,
    EngineMetrics,
    Grammar,
    ModelFacts,
    ModelThread,
    Phase,
    Request,
    RequestOptions,
    SamplingOptions,
    Ticket,
)
from erllama.engine.requests.request import MOST_SPECULATIVE
from erllama.errors import OptionError, PromptError

Prompt = str | Sequence[int] | NDArray[np.integer]
Messages = Sequence[Mapping[str, object]]


class Model(ChatMethods, AdapterMethods, EmbeddingMethods):
    """A loaded model. Made by `load_model` or `load_backend`; safe to use from any thread.

    Attributes:
        id: its name in this process.
        cache: where its prompts are kept.
        policy: what of its contexts is saved, and when.
    """

    def __init__(
        self, backend: Backend, id: str, cache: Cache, policy: Policy, cache_salt: str | None, shape: Shape
    ) -> None:
        super().__init__(backend, id, cache, policy, cache_salt, shape)
        self._embeddings = Embeddings(backend, id, self._runner.check, partial(checked_ids, backend.vocabulary))

    def __repr__(self) -> str:
        state = "unloaded" if self._runner.stopped else self.phase
        return f"<erllama.Model {self.id!r}, {state}>"

    def __del__(self) -> None:
        runner: ModelThread | None = getattr(self, "_runner", None)
        if runner is None or runner.stopped or not runner.is_ours:
            return
        _registry.drop(self, runner)
        runner.begin_to_stop()  # waits for nothing: the garbage collector calls this in any thread
        warnings.warn(
            f"model {self.id!r} was dropped and is unloaded; call its unload(), or load it in a `with`",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()

    # --- replies -----------------------------------------------------------------------

    def complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """Complete a prompt and wait for the whole reply.

        Args:
            prompt: text, or token ids. Text is tokenized with special tokens read as such, and with the model's
                BOS, unless it begins with it. Token ids are taken as they are.
            max_tokens: most tokens of the reply; None, the default, for as many as the context holds.
                Where the context is full before, the reply ends with "context_full".
            temperature: 0 takes the most likely token; higher is more random; 0.8 by default.
            top_k: draw from the k most likely tokens, 40; 0 for all.
            top_p: draw from the fewest tokens whose probabilities sum to this, 0.95; 1 for all.
            min_p: draw from tokens at least this times as likely as the most likely, 0.05; 0 for all.
            seed: fixes the draws; None draws a seed, told in the result.
            logit_bias: by token id, what is added to its logit; -inf rules it out.
            banned_tokens: ids that are never drawn.
            repeat_penalty, repeat_last_n, frequency_penalty, presence_penalty: make what came lately less likely.
            dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n, dry_sequence_breakers: make going on
                with a repetition less likely.
            top_n_sigma, typical_p, xtc_probability, xtc_threshold: other ways to drop candidates.
            dynatemp_range, dynatemp_exponent: let the temperature follow how uncertain the model is.
            mirostat, mirostat_tau, mirostat_eta: aim at one surprise for all tokens, in place of dropping some.
            min_keep: the fewest candidates that a step leaves.
            samplers: the steps and their order: names, and functions of one's own from Candidates to Candidates.
            sampling_state: that of another Completion, to go on with its draws.
            grammar, json_schema, regex: keep the reply to GBNF or an erllama.Grammar, to a JSON schema, or to a
                regular expression; at most one of them. The reply ends where nothing can follow.
            grammar_triggers: texts, or ids of tokens, at the first of which the grammar begins, itself a part
                of it.
            stop: a text, or several, at which the reply ends; the first by position wins, and is
                neither part of the reply nor streamed, but told as `stop_sequence`. The text of a special token
                stops at that token, too.
            stop_token_ids: ids of tokens at which the reply ends, wherever they come; told as `stop_token`.
            logprobs: tell how likely each token was, and the most likely ones, this many of them, 0 to 100.
            reproducible: reuse only KV that gives, bit for bit, the reply of a cold run, and
                have the context to itself.
            cache_salt: share cached KV only with requests of the same salt; None for the model's.
            parent_key: the `finish_key` of the reply that the prompt goes on from; where that is still
                being saved, it is waited for. A text that begins as that context does has the tokens that it was
                computed as, whatever its own would be; not with `reproducible`. One that nobody knows changes
                nothing.
            session_id: a name; the context stays in its cells for the next request of that name.
            thinking: "enabled", or True, tells what the model thinks from what it answers, by the markers of its
                chat template; a model without leaves all of it text, as does "disabled", the default.
            thinking_markers: texts that open and close thinking, as a pair of one each, or of several.
            thinking_budget_tokens: most tokens of thinking; then its closing marker is put into the context.
            thinking_budget_message: what is put before that marker.
            thinking_signing_key: bytes; what was thought is signed with them.
            tool_markers, tool_payload_markers: texts that open and close a tool call, and its arguments; the tokens
                of a call that are none of its arguments are the most likely ones.
            speculative: compute tokens that are likely to come together with the next: "ngram" takes what followed
                the last few tokens before, a smaller model of the same vocabulary drafts, or a function of all
                tokens and a number does. The reply is the same in fewer decodes; where that does not pay, it stops.
            speculative_tokens: most tokens computed ahead at once, 8.
            timeout: seconds in which the reply must be done, waiting included.

        Raises:
            PromptError: the prompt is empty, or an id is outside the vocabulary.
            PromptTooLong: it does not fit the context.
            OptionError: an option is unknown, ill-typed or out of range.
            QueueFull: as many requests wait as may.
            SessionBusy: a request of this session runs or waits.
            DeadlineExceeded: the reply was not done within `timeout`.
            ModelUnloaded: the model is, or was during the request, unloaded.
            CalledFromModelThread: by a callback that the model's own thread runs.
            BackendError, SamplingError: the model could not compute a reply.
        """
        return self._wait(self._ticket(prompt, self._options(options, "complete")))

    def stream(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Stream:
        """Complete a prompt and get the reply as it comes; options and errors as for `complete`.

        The prompt and options are checked at once; errors of the run come with the events.
        """
        ticket = self._ticket(prompt, self._options(options, "stream"), streaming=True)
        stream = Stream(ticket)
        self._runner.submit(ticket)
        return stream

    def compile_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar before a request needs it: the first of a model takes longest.

        Requests under other grammars, and none, go on meanwhile.

        Raises:
            GrammarError: it cannot be compiled for this model's vocabulary.
            ModelUnloaded: the model is unloaded.
        """
        if not isinstance(grammar, Grammar):
            raise OptionError(f"compile_grammar({shown(grammar)}); give an erllama.Grammar")
        self._runner.compile(grammar)

    def prefill(self, prompt: Prompt, **options: Unpack[PrefillOptions]) -> Completion:
        """Read a prompt into the cache and sample nothing; options and errors as for `complete`."""
        return self._wait(self._ticket(prompt, request_options(options, "prefill", self._cache_salt, prefill=True)))

    def draft(self, prefix: Prompt, n: int, **unknown: Never) -> list[int]:
        """The `n` tokens that most likely follow, fewer where the model ends; for another model to `verify`.

        Raises:
            OptionError: n is below 1.
            Error: as of `complete`.
        """
        reject_unknown(unknown, (), "draft")
        reply = self.complete(prefix, max_tokens=integer("n", n, 1), temperature=0.0)
        return list(reply.tokens)

    def verify(self, prefix: Prompt, candidates: Sequence[int], **unknown: Never) -> Verification:
        """How many of some tokens this model, too, would take after a prefix; errors as of `complete`.

        They are computed together. What others have in the context stays as it is.
        """
        reject_unknown(unknown, (), "verify")
        ids = self._prompt_ids(prefix)
        proposed = self._checked_ids(candidates).tolist()
        options = RequestOptions(
            max_tokens=len(proposed) + 1,
            sampling=SamplingOptions(temperature=0.0),
            cache_salt=self._cache_salt,
            speculative=lambda prompt: fixed(proposed, len(prompt)),
            speculative_tokens=min(max(len(proposed), 1), MOST_SPECULATIVE),
        )
        reply = self._wait(Ticket(Request(ids, options), streaming=False))
        pairs = zip(reply.tokens, proposed, strict=False)
        accepted = next((i for i, (token, other) in enumerate(pairs) if token != other), None)
        if accepted is None:
            accepted = min(len(reply.tokens), len(proposed))
        end = accepted == len(reply.tokens) and reply.finish_reason == "stop"
        return Verification(accepted, reply.tokens[accepted] if accepted < len(reply.tokens) else None, end)

    async def acomplete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """`complete` for asyncio: no thread waits. Cancelling the task cancels the request."""
        request = self._options(options, "acomplete")
        if request.grammar is not None:
            await asyncio.to_thread(self._runner.compile, request.grammar)  # the loop goes on
        return await self._wait_async(self._ticket(prompt, request))

    def astream(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> AsyncStream:
        """`stream` for asyncio: `async for event in model.astream(...)`. Called where a loop runs."""
        ticket = self._ticket(prompt, self._options(options, "astream"), streaming=True)
        stream = AsyncStream(ticket)
        self._runner.submit(ticket)
        return stream

    async def aprefill(self, prompt: Prompt, **options: Unpack[PrefillOptions]) -> Completion:
        """`prefill` for asyncio."""
        request = request_options(options, "aprefill", self._cache_salt, prefill=True)
        return await self._wait_async(self._ticket(prompt, request))

    # --- likelihoods and gaps ----------------------------------------------------------

    def score(self, prompt: Prompt, continuation: Prompt, **options: Unpack[PrefillOptions]) -> Score:
        """How likely a continuation is after a prompt; nothing is sampled.

        The prompt's KV is taken from the cache, and kept there, as any prompt's.

        Args:
            prompt: text or token ids, as of `complete`.
            continuation: likewise. Two texts are tokenized as one; where the tokenizer joins characters of both
                in a token, that one is the continuation's.

        Options and errors as for `prefill`.
        """
        return Score.of(self._wait(self._score_ticket(prompt, continuation, options, "score")))

    async def ascore(self, prompt: Prompt, continuation: Prompt, **options: Unpack[PrefillOptions]) -> Score:
        """`score` for asyncio. Cancelling the task cancels the request."""
        return Score.of(await self._wait_async(self._score_ticket(prompt, continuation, options, "ascore")))

    def _score_ticket(self, prompt: object, continuation: object, options: PrefillOptions, where: str) -> Ticket:
        checked = request_options(options, where, self._cache_salt, prefill=True)
        self._check_generates()
        self._check_length(*(text for text in (prompt, continuation) if isinstance(text, str)))
        ids, n_scored = with_continuation(prompt, continuation, self._backend.vocabulary, self._prompt_ids)
        return Ticket(Request(ids, replace(checked, logprobs=1), n_scored), streaming=False)

    def infill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> Completion:
        """What is between two texts, by a model that was trained to fill gaps; options as for `complete`.

        Args:
            prefix, suffix: what is before the gap, and after it; one of them may be empty.

        Raises:
            Unsupported: the model has no tokens that mark gaps.
            Error: as of `complete`.
        """
        return self.complete(self._gap(prefix, suffix), **options)

    def stream_infill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> Stream:
        """`infill` as it comes."""
        return self.stream(self._gap(prefix, suffix), **options)

    async def ainfill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> Completion:
        """`infill` for asyncio. Cancelling the task cancels the request."""
        return await self.acomplete(self._gap(prefix, suffix), **options)

    def astream_infill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> AsyncStream:
        """`stream_infill` for asyncio. Called where a loop runs."""
        return self.astream(self._gap(prefix, suffix), **options)

    def _gap(self, prefix: object, suffix: object) -> NDArray[np.int32]:
        self._check_generates()
        self._check_length(*(text for text in (prefix, suffix) if isinstance(text, str)))
        return around_gap(prefix, suffix, self._backend.vocabulary, self.id)

    # --- sessions and saving ------------------------------------------------------------

    def end_session(self, session_id: str, *, cache_salt: str | None = None, **unknown: Never) -> bool:
        """Stop keeping the context of a session; False where none is kept.

        What was computed stays in the cache.

        Raises:
            SessionBusy: a request of it runs or waits.
        """
        reject_unknown(unknown, ("cache_salt",), "end_session")
        options = RequestOptions(session_id=session_id, cache_salt=self._salt(cache_salt))
        return self._runner.end_session(session_id, options.cache_salt)

    def evict(self) -> None:
        """Save what the context holds, wait until it is stored, and let go of KV that no request uses.

        A request in flight is saved as far as it is, and goes on.
        """
        self._runner.evict()

    # --- text --------------------------------------------------------------------------

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False, **unknown: Never
    ) -> NDArray[np.int32]:
        """Token ids of a text, int32, shape (n,).

        Args:
            text: text, or its bytes.
            add_special: add the BOS and EOS that the model asks for.
            parse_special: read the text of special tokens as those tokens. A BOS or EOS that the text has is then
                not added again.
        """
        reject_unknown(unknown, ("add_special", "parse_special"), "tokenize")
        self._check_loaded()
        if not isinstance(text, str | bytes):
            raise PromptError(f"{shown(text)} is no text")
        add_special, parse_special = boolean("add_special", add_special), boolean("parse_special", parse_special)
        if add_special and parse_special:
            return self._tokenizer.tokenize(text)
        return self._backend.vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(
        self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False, **unknown: Never
    ) -> str:
        """The text of token ids; bytes that are no UTF-8 appear as U+FFFD.

        Args:
            tokens: ids, shape (n,).
            special: write special tokens out instead of leaving them out.
        """
        reject_unknown(unknown, ("special",), "detokenize")
        self._check_loaded()
        raw = self._backend.vocabulary.detokenize(self._checked_ids(tokens), special=boolean("special", special))
        return raw.decode("utf-8", "replace")

    # --- state: reading these never waits -------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Tokens the context holds."""
        return self._backend.limits.n_ctx

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""
        return self._backend.vocabulary.n_tokens

    @property
    def phase(self) -> Phase:
        """What the model does now: "idle", "prefilling" or "generating"."""
        return self._runner.phase

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self._runner.pending

    @property
    def queue_depth(self) -> int:
        """Requests that are admitted: that compute, or wait for another to compute what they share."""
        return self._runner.running

    @property
    def last_cache_hit(self) -> CacheHit | None:
        """How warm the latest request's prompt was; None before the first."""
        return self._runner.last_hit

    @property
    def metrics(self) -> EngineMetrics:
        """Counts since it was loaded; never waits."""
        return self._runner.metrics

    @property
    def info(self) -> ModelInfo:
        """What it is, and how it stands."""
        facts = getattr(self._backend, "facts", None) or ModelFacts()
        return ModelInfo(
            **{field.name: getattr(facts, field.name) for field in fields(ModelFacts)},
            id=self.id,
            backend=str(self._backend.namespace.get("backend", type(self._backend).__name__)),
            description=str(getattr(self._backend, "description", "")),
            vocab_only=bool(getattr(self._backend, "vocab_only", False)),
            n_ctx=self.n_ctx,
            n_vocab=self.n_vocab,
            n_seq_max=self._n_seq_max,
            phase=self.phase,
            pending=self.pending,
            queue_depth=self.queue_depth,
            cache_problem=self._runner.cache_problem,
        )

    @property
    def metadata(self) -> Mapping[str, object]:
        """All of the model file's metadata, with `overrides` in it: numbers, texts, bools, lists of texts, and
        arrays of numbers; empty for a backend without."""
        return getattr(self._backend, "metadata", None) or MappingProxyType({})

    def cached_prefix(self, prompt: Prompt, *, cache_salt: str | None = None, **unknown: Never) -> int:
        """How many tokens of a prompt the cache has, so need not be computed; without waiting for the model.

        For routers: what is only in the context, and not yet saved, is not counted.
        """
        reject_unknown(unknown, ("cache_salt",), "cached_prefix")
        ids = self._prompt_ids(prompt)
        if self._runner.cache_problem:
            return 0
        with self.cache.lookup(
            self._namespace(cache_salt),
            ids[:-1],
            whole=not self._backend.limits.can_trim,
            loadable=True,
            count=False,
        ) as match:
            return match.n_tokens

    def unload(self) -> None:
        """End the model: requests in flight and waiting fail with ModelUnloaded. Idempotent.

        What they had computed is saved, within the policy's `evict_save_timeout_ms`. In a signal handler that
        interrupts a call of this library, it returns at once, and a thread does the rest.
        """
        if reentered():
            # No threading.Thread: its start takes locks that may be held here, too.
            self._runner.begin_to_stop()
            start_new_thread(self._unload, ())
        else:
            self._unload()

    def _unload(self) -> None:
        try:
            self._embeddings.close()
        finally:
            self._runner.stop()
            _registry.remove(self)
