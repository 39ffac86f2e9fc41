"""`Model`: the public interface of a loaded model.

Each public method is documented here and delegates to one collaborator: `CompletionRequests`, `ChatRequests`,
`EmbeddingRequests`, `AdapterLoader` or the runner. `load_model` and `load_backend` create models.
"""

from __future__ import annotations

import asyncio
import warnings
from _thread import start_new_thread
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from threading import Event as ThreadEvent
from types import MappingProxyType
from typing import Literal, Never, Protocol, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from erllama._model.adapters import Adapter, AdapterLoader
from erllama._model.info import ModelInfo
from erllama._model.requests import tool_runs
from erllama._model.requests.chat_streams import AsyncChatStream, ChatStream
from erllama._model.requests.chats import ChatRequests
from erllama._model.requests.completions import CompletionRequests
from erllama._model.requests.embeddings import EMBED_OPTIONS, EmbeddingRequests, Pooling, Rows, Texts, set_on_error
from erllama._model.requests.options import (
    ChatOptions,
    CompletionOptions,
    PinOptions,
    PrefillOptions,
    TemplateOptions,
    ToolRunOptions,
)
from erllama._model.requests.pins import PinRequests
from erllama._model.requests.prompts import PromptReader
from erllama._model.requests.scoring import Score
from erllama._model.requests.speculation import Verification
from erllama._model.requests.streams import AsyncStream, Stream
from erllama._model.requests.tool_runs import AsyncToolStream, ToolRun, ToolStream
from erllama._model.runner import ModelRunner
from erllama._runtime.reentry import reentered
from erllama._types import Messages, Prompt
from erllama.cache import Cache, Pin, Policy
from erllama.chat.chats import Chats
from erllama.chat.results import ChatCompletion
from erllama.checks import boolean, integer, reject_unknown, shown
from erllama.engine import (
    Backend,
    CacheHit,
    Completion,
    EngineMetrics,
    Grammar,
    ModelFacts,
    Phase,
    RequestOptions,
    Vocabulary,
)
from erllama.errors import OptionError, PromptError
from erllama.models.download.hub import pull_from_hub


class ModelRegistry(Protocol):
    """Lists the loaded models; a model leaves it when it is unloaded. `erllama._model.registry` implements it."""

    def remove(self, model: Model) -> None:
        """Remove an unloaded model."""
        ...

    def remove_dropped(self, model: Model, runner: ModelRunner) -> None:
        """Remove a model that was dropped without unload(), whose runner is about to stop."""
        ...


class Model:
    """A loaded model. `load_model` and `load_backend` create it. Safe to use from any thread.

    Attributes:
        id: the model's name in this process.
        cache: the cache of its prompts.
        policy: which parts of its contexts are saved, and when.
    """

    def __init__(
        self,
        backend: Backend,
        id: str,
        cache: Cache,
        policy: Policy,
        cache_salt: str | None,
        runner: ModelRunner,
        n_seq_max: int,
        registry: ModelRegistry,
    ) -> None:
        self.id, self.cache, self.policy = id, cache, policy
        self._registry = registry
        self._backend = backend
        self._n_seq_max = n_seq_max
        self._runner = runner  # after all that `__del__` uses
        # No collaborator refers to the model: a reference cycle would delay `__del__` until the garbage collector
        # runs.
        chats = Chats(backend, cache, runner.namespace)
        self._prompts = PromptReader(backend, id, runner, chats)
        self._requests = CompletionRequests(backend, id, runner, self._prompts, chats, cache_salt)
        self._chat_requests = ChatRequests(runner, self._prompts, self._requests, chats)
        self._pins = PinRequests(backend, id, cache, runner, self._prompts, self._requests, self._chat_requests)
        self._embeddings = EmbeddingRequests(backend, id, runner, self._prompts)
        self._adapters = AdapterLoader(backend, id, cache, runner, self._prompts)

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        filename: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        on_download: Callable[[float], object] | None = None,
        **options: object,
    ) -> Model:
        """Download a model of the Hugging Face hub, unless it is there already, and load it.

        The files lie in the cache of huggingface_hub. Needs `pip install 'erllama[hub]'`.

        Args:
            repo: "ORG/NAME".
            filename: a file of the repository, a pattern such as "*Q4_K_M.gguf", or a quantization such as
                "Q4_K_M". None for Q4_K_M, or for the only model of the repository.
            revision: a branch, a tag or a commit; None for "main".
            cache_dir: directory of the cache; None for that of huggingface_hub.
            on_download: called with the downloaded fraction, 0.0 to 1.0. Returning False cancels.
            options: of `load_model`.

        Raises:
            DownloadError: the download fails, or its digest is wrong.
            MissingPackage: huggingface_hub is not installed.
            Error: as for `load_model`.
        """
        from erllama._model.load import check_load_options, load_model

        loading = {name: value for name, value in options.items() if name not in ("id", "cache", "on_progress")}
        check_load_options(loading)  # before a long download
        path = pull_from_hub(repo, filename, revision=revision, cache_dir=cache_dir, on_progress=on_download)
        return load_model(path, **options)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        state = "unloaded" if self._runner.stopped else self.phase
        return f"<erllama.Model {self.id!r}, {state}>"

    def __del__(self) -> None:
        if not self._begin_to_unload():
            return
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

    # --- completions -------------------------------------------------------------------

    def complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """Complete a prompt and return the whole reply.

        Args:
            prompt: text, or token ids. Special tokens in a text are parsed, and the model's BOS is added unless the
                text begins with it. Token ids are used unchanged.
            max_tokens: maximum number of tokens of the reply. None, the default, for as many as the context holds.
                A reply that fills the context ends with finish_reason "context_full".
            temperature: randomness of the sampling, 0.8. 0 takes the most likely token.
            top_k: sample from the k most likely tokens, 40. 0 for all.
            top_p: sample from the fewest tokens whose probabilities sum to this, 0.95. 1 for all.
            min_p: sample from tokens at least this many times as likely as the most likely one, 0.05. 0 for all.
            seed: seed of the sampling. None draws a random seed, which the result has as `seed`.
            logit_bias: values added to logits, by token id. -inf excludes a token.
            banned_tokens: ids of tokens that are never sampled.
            repeat_penalty, repeat_last_n, frequency_penalty, presence_penalty: make recent tokens less likely.
            dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n, dry_sequence_breakers: make the
                continuation of a repetition less likely.
            top_n_sigma, typical_p, xtc_probability, xtc_threshold: other filters of candidates.
            dynatemp_range, dynatemp_exponent: vary the temperature with the entropy of the candidates.
            mirostat, mirostat_tau, mirostat_eta: keep the surprise of every token near a target, instead of
                filters.
            min_keep: minimum number of candidates that a filter keeps.
            samplers: the steps and their order: names, and functions from Candidates to Candidates.
            sampling_state: `sampling_state` of another Completion, whose random sequence the request continues.
            grammar, json_schema, regex: constrain the reply to GBNF or an erllama.Grammar, to a JSON schema, or to
                a regular expression. Pass at most one of them. The reply ends when the grammar allows no further
                token.
            grammar_triggers: texts or token ids. The grammar starts at the first of them, which is part of it.
            stop: a text, or several, at which the reply ends. The first one by position ends it. It is neither part
                of the reply nor streamed; the result has it as `stop_sequence`. The text of a special token also
                stops at that token.
            stop_token_ids: ids of tokens at which the reply ends, at any position. The result has the token as
                `stop_token`.
            logprobs: return the log probability of each token and this many of the most likely ones, 0 to 100.
            reproducible: reuse KV only if the reply then has the bits of a cold run, and run alone in the context.
            cache_salt: share cached KV only with requests of the same salt. None for the model's.
            parent_key: `finish_key` of the reply that the prompt continues. A pending save of that reply is
                awaited. A text that begins with the reply's context keeps the context's tokens, even if the
                tokenizer would split that text otherwise; not with `reproducible`. An unknown key has no effect.
            session_id: a name. The context keeps its cells for the next request with that name.
            thinking: "enabled" or True separates thinking from the answer, by the markers of the model's chat
                template. Without such markers, and with "disabled", the default, the whole reply is text.
            thinking_markers: a pair of the texts that open and close thinking, one each or several.
            thinking_budget_tokens: maximum number of tokens of thinking. Then the closing marker is added.
            thinking_budget_message: text that is added before that marker.
            thinking_signing_key: bytes; the thinking is signed with this key.
            tool_markers, tool_payload_markers: pairs of texts that open and close a tool call, and its arguments.
                The tokens of a call outside its arguments are the most likely ones.
            speculative: compute likely tokens ahead. "ngram" takes the tokens that followed the last few tokens
                earlier; a smaller model of the same vocabulary drafts; a function of all tokens and a number
                drafts. The reply is the same in fewer decodes. Speculation pauses while it saves no time.
            speculative_tokens: maximum number of tokens computed ahead at once, 8.
            timeout: seconds after which the request fails, including its wait.

        Raises:
            PromptError: the prompt is empty, or an id is outside the vocabulary.
            PromptTooLong: the prompt does not fit the context.
            OptionError: an option is unknown, has the wrong type or is out of range.
            QueueFull: the queue of waiting requests is full.
            SessionBusy: a request of this session is running or waiting.
            DeadlineExceeded: the reply was not complete within `timeout`.
            ModelUnloaded: the model is unloaded, or was unloaded during the request.
            CalledFromModelThread: a callback in the model's own thread made the call.
            BackendError, SamplingError: the model could not compute a reply.
        """
        return self._requests.run(self._requests.ticket(prompt, self._requests.options(options, "complete"), self))

    def stream(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Stream:
        """Complete a prompt and return the reply as a stream; options and errors as for `complete`.

        The call checks the prompt and the options. Iterating raises the errors of the run.
        """
        checked = self._requests.options(options, "stream")
        ticket = self._requests.ticket(prompt, checked, self, streaming=True)
        stream = Stream(ticket)
        self._runner.submit(ticket)
        return stream

    def compile_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar before a request needs it. The first grammar of a model takes longest.

        Other requests continue during the compilation.

        Raises:
            GrammarError: the grammar cannot be compiled for this model's vocabulary.
            ModelUnloaded: the model is unloaded.
        """
        if not isinstance(grammar, Grammar):
            raise OptionError(f"compile_grammar({shown(grammar)}); pass an erllama.Grammar")
        self._runner.compile(grammar)

    def prefill(self, prompt: Prompt, **options: Unpack[PrefillOptions]) -> Completion:
        """Compute a prompt into the cache without sampling; options and errors as for `complete`."""
        checked = self._requests.prefill_options(options, "prefill")
        return self._requests.run(self._requests.ticket(prompt, checked, self))

    def draft(self, prefix: Prompt, n: int, **unknown: Never) -> list[int]:
        """Return the `n` tokens that most likely follow, for another model to `verify`; fewer if the reply ends.

        Raises:
            OptionError: n is below 1.
            Error: as for `complete`.
        """
        reject_unknown(unknown, (), "draft")
        reply = self.complete(prefix, max_tokens=integer("n", n, 1), temperature=0.0)
        return list(reply.tokens)

    def verify(self, prefix: Prompt, candidates: Sequence[int], **unknown: Never) -> Verification:
        """Return how many proposed tokens this model would also generate after a prefix; errors as for `complete`.

        The tokens are computed together. Cells of other requests stay in the context.
        """
        reject_unknown(unknown, (), "verify")
        return self._requests.verify(prefix, candidates)

    async def acomplete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """`complete` for asyncio. No thread waits. Cancelling the task cancels the request."""
        checked = self._requests.options(options, "acomplete")
        if checked.grammar is not None:
            await asyncio.to_thread(self._runner.compile, checked.grammar)  # would block the event loop
        return await self._requests.run_async(self._requests.ticket(prompt, checked, self))

    def astream(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> AsyncStream:
        """`stream` for asyncio: `async for event in model.astream(...)`. Call it in a running event loop."""
        checked = self._requests.options(options, "astream")
        ticket = self._requests.ticket(prompt, checked, self, streaming=True)
        stream = AsyncStream(ticket)
        self._runner.submit(ticket)
        return stream

    async def aprefill(self, prompt: Prompt, **options: Unpack[PrefillOptions]) -> Completion:
        """`prefill` for asyncio."""
        checked = self._requests.prefill_options(options, "aprefill")
        return await self._requests.run_async(self._requests.ticket(prompt, checked, self))

    # --- chats -------------------------------------------------------------------------

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Return the whole reply to a conversation.

        Takes the options of `complete`, with another meaning of `thinking`, and these:

        Args:
            messages: the conversation, in the form of OpenAI's clients or in Anthropic's blocks.
            tools: tools that the model may call: Python functions, or schemas in the form of either client. The
                schema of a function comes from its signature and its docstring.
            tool_choice: "auto", the default; "none"; "required"; or the name of a tool that the reply must call.
            parallel_tool_calls: whether one reply may call several tools, True.
            tool_format: name of the format in which the model writes calls (docs/chat.md). None to detect it from
                the template.
            chat_template: text of a template, name of one of the model's templates, or pathlib.Path of a file. None
                for the model's own, or ChatML if it has none.
            template_args: variables for the template besides the conversation.
            documents: documents for the template.
            continue_final_message: continue the last message, which is the assistant's, instead of answering. The
                reply's `message` is then the whole message and replaces the last one.
            special_tokens_in_content: whether content may contain the text of special tokens, True. With False, the
                content of messages that are not the assistant's, tools and documents are plain text.
            thinking: "enabled" or True; "disabled" or False; None for the template's default. Thinking is always
                separated from the answer.

        The model remembers a reply as the tokens that it sampled. If the reply returns in `messages`, the next
        prompt has these tokens, even if the tokenizer would split the text otherwise. With `reproducible`, the text
        alone counts.

        Raises:
            ChatError: the messages or tools are invalid. It has the index of the message.
            TemplateError: the template does not parse, rejects the conversation, or takes too long.
            Error: as for `complete`.
        """
        return self._chat_requests.run(messages, options, "chat", self)

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatStream:
        """Return the reply to a conversation as a stream; options and errors as for `chat`.

        If you leave a stream before its end, the model remembers the part that you read.
        """
        ticket, turn = self._chat_requests.ticket(messages, options, "stream_chat", self, streaming=True)
        stream = ChatStream(ticket, turn)
        self._runner.submit(ticket)
        return stream

    async def achat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """`chat` for asyncio. Cancelling the task cancels the request."""
        return await self._chat_requests.run_async(messages, options, "achat", self)

    def astream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncChatStream:
        """`stream_chat` for asyncio. The first await raises the errors of the request."""
        return AsyncChatStream(
            lambda: self._chat_requests.ticket(messages, options, "astream_chat", self, streaming=True),
            self._runner.submit,
        )

    def run_tools(
        self,
        messages: Messages,
        tools: Sequence[Callable[..., object]],
        *,
        max_turns: int = 8,
        **options: Unpack[ToolRunOptions],
    ) -> ToolRun:
        """Reply to a conversation, and call the functions that the replies name, until a reply has no call.

        The functions run in this thread, one after another. What a function returns goes to the model as text: a
        str as it is, other values as JSON. An exception goes to the model, too, with its type and message.

        Args:
            tools: the functions. They need annotations of JSON's types, and names that differ.
            max_turns: maximum number of replies. The calls of the last one are not run.

        Other options, and errors, as for `chat`.

        Returns:
            the last reply, the conversation with all replies and results, and the results.
        """
        return tool_runs.run(self.chat, messages, tools, max_turns, options)

    def stream_run_tools(
        self,
        messages: Messages,
        tools: Sequence[Callable[..., object]],
        *,
        max_turns: int = 8,
        **options: Unpack[ToolRunOptions],
    ) -> ToolStream:
        """`run_tools` as a stream: the events of each reply, and a ToolResult after each call."""
        return ToolStream(self.stream_chat, messages, tools, max_turns, options)

    async def arun_tools(
        self,
        messages: Messages,
        tools: Sequence[Callable[..., object]],
        *,
        max_turns: int = 8,
        **options: Unpack[ToolRunOptions],
    ) -> ToolRun:
        """`run_tools` for asyncio. Coroutine functions are awaited, and other functions run in threads."""
        return await tool_runs.run_async(self.achat, messages, tools, max_turns, options)

    def astream_run_tools(
        self,
        messages: Messages,
        tools: Sequence[Callable[..., object]],
        *,
        max_turns: int = 8,
        **options: Unpack[ToolRunOptions],
    ) -> AsyncToolStream:
        """`stream_run_tools` for asyncio. The first await raises the errors of the request."""
        return AsyncToolStream(self.astream_chat, messages, tools, max_turns, options)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **options: Unpack[TemplateOptions],
    ) -> NDArray[np.int32]:
        """Return the tokens of a conversation, int32, shape (n,), for `complete`, `prefill` or `stream`.

        Args:
            add_generation_prompt: end with the text that begins a reply.
            cache_salt: salt of the requests whose replies keep their tokens. None for the model's.

        Other options, and errors, as for `chat`.
        """
        return self._chat_requests.prompt_ids(messages, options, add_generation_prompt, cache_salt)

    def render_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, **options: Unpack[TemplateOptions]
    ) -> str:
        """Return the text of a conversation; options and errors as for `apply_chat_template`."""
        return self._chat_requests.text(messages, options, add_generation_prompt)

    # --- pins ----------------------------------------------------------------------------

    def pin(self, prompt: Prompt | Messages, **options: Unpack[PinOptions]) -> Pin:
        """Compute a prefix into the cache and keep it there. See docs/caching.md.

        Writes its blocks to the disk tier; without one, to `ram_file`; without either, they stay in RAM. Eviction
        skips them there. They are read into RAM when the model is loaded.

        Args:
            prompt: text, token ids, or messages. A conversation that ends with a message of the user or a tool is
                pinned as the prompt of the reply. Any other one is pinned up to the beginning of the next message
                of the user, so that every conversation that continues it has its tokens.
            name: its name, unique in the cache; of 1 to 200 characters. It replaces a pin of that name. None for a
                name made of the tokens, so that the same prefix has one pin.
            ttl: how long it lasts: seconds, or a text such as "30min", "1h" or "7d". None for no end.
            cache_salt: salt of the requests that share the prefix. None for the model's.
            timeout: seconds after which the computation fails, including its wait.
            tools, chat_template, template_args, documents, thinking: as for `chat`; only with messages.
            continue_final_message, special_tokens_in_content: as for `chat`; only with messages.

        Raises:
            PinQuotaExceeded: pins would protect more bytes than the cache's `pin_quota`.
            PinError: the prefix cannot be stored.
            OptionError: an option is unknown, has the wrong type or is out of range.
            Error: as for `prefill`, and with messages as for `chat`.
        """
        return self._pins.run(prompt, options, self)

    async def apin(self, prompt: Prompt | Messages, **options: Unpack[PinOptions]) -> Pin:
        """`pin` for asyncio. Cancelling the task cancels the computation."""
        return await self._pins.run_async(prompt, options, self)

    def unpin(self, name: str) -> bool:
        """Remove a pin from the model's cache. Return False if no pin has this name. See `Cache.unpin`."""
        return self.cache.unpin(name)

    # --- scores and infilling ----------------------------------------------------------

    def score(self, prompt: Prompt, continuation: Prompt, **options: Unpack[PrefillOptions]) -> Score:
        """Return how likely a continuation is after a prompt, without sampling.

        As with any prompt, the prompt's KV is taken from the cache and saved to it.

        Args:
            prompt: text or token ids, as for `complete`.
            continuation: text or token ids. Two texts are tokenized as one. A token that spans both belongs to the
                continuation.

        Options and errors as for `prefill`.
        """
        checked = self._requests.prefill_options(options, "score")
        return Score.of(self._requests.run(self._requests.score_ticket(prompt, continuation, checked)))

    async def ascore(self, prompt: Prompt, continuation: Prompt, **options: Unpack[PrefillOptions]) -> Score:
        """`score` for asyncio. Cancelling the task cancels the request."""
        checked = self._requests.prefill_options(options, "ascore")
        return Score.of(await self._requests.run_async(self._requests.score_ticket(prompt, continuation, checked)))

    def infill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> Completion:
        """Return the text between two texts, from a model trained for infilling; options as for `complete`.

        Args:
            prefix, suffix: the texts before and after the gap. One of them may be empty.

        Raises:
            Unsupported: the model has no tokens that mark gaps.
            Error: as for `complete`.
        """
        return self.complete(self._requests.infill_prompt(prefix, suffix), **options)

    def stream_infill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> Stream:
        """`infill` as a stream."""
        return self.stream(self._requests.infill_prompt(prefix, suffix), **options)

    async def ainfill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> Completion:
        """`infill` for asyncio. Cancelling the task cancels the request."""
        return await self.acomplete(self._requests.infill_prompt(prefix, suffix), **options)

    def astream_infill(self, prefix: str, suffix: str, **options: Unpack[CompletionOptions]) -> AsyncStream:
        """`stream_infill` for asyncio. Call it in a running event loop."""
        return self.astream(self._requests.infill_prompt(prefix, suffix), **options)

    # --- embeddings and rankings -------------------------------------------------------

    @overload
    def embed(
        self, texts: Texts, *, pooling: Pooling | None = None, normalize: bool = True, truncate: bool = False
    ) -> Rows: ...

    @overload
    def embed(
        self, texts: Texts, *, pooling: Literal["none"], normalize: bool = True, truncate: bool = False
    ) -> list[Rows]: ...

    def embed(
        self,
        texts: Texts,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        **unknown: Never,
    ) -> Rows | list[Rows]:
        """Return the vectors of texts. Models trained for it map texts of similar meaning to nearby vectors.

        Many short texts are computed in one decode. Replies of the model continue meanwhile.

        Args:
            texts: one text or several, or token ids: one sequence or several. Text is tokenized as a prompt is.
            pooling: how the vectors of a text's tokens become one: "mean", their average; "cls", the first; "last",
                the last; or "none", all of them. None for the pooling that the model's file names, or "mean" if
                it does not name one.
            normalize: scale each vector to length 1.
            truncate: cut texts that are too long instead of raising PromptTooLong. Tokens that the tokenizer adds
                at the end of a text are kept.

        Returns:
            float32, shape (texts, d): one row per text, in their order. With pooling "none", a list with one array
            per text, of shape (tokens, d).

        Raises:
            PromptError: there is no text, a text is empty or has the wrong type, or an id is outside the
                vocabulary.
            PromptTooLong: a text has more tokens than the model takes at once.
            OptionError: an option is unknown, has the wrong type or is out of range.
            Unsupported: the backend does not embed; or the model ranks, and no pooling was passed.
            ModelUnloaded: the model is unloaded, or was unloaded during the call.
            BackendError: the model could not compute the vectors.
        """
        reject_unknown(unknown, EMBED_OPTIONS, "embed")
        return self._embeddings.embed(texts, pooling, normalize, truncate, ThreadEvent())

    @overload
    async def aembed(
        self, texts: Texts, *, pooling: Pooling | None = None, normalize: bool = True, truncate: bool = False
    ) -> Rows: ...

    @overload
    async def aembed(
        self, texts: Texts, *, pooling: Literal["none"], normalize: bool = True, truncate: bool = False
    ) -> list[Rows]: ...

    async def aembed(
        self,
        texts: Texts,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        **unknown: Never,
    ) -> Rows | list[Rows]:
        """`embed` for asyncio, in a thread. Cancelling the task ends the computation at its next decode."""
        reject_unknown(unknown, EMBED_OPTIONS, "aembed")
        with set_on_error() as cancelled:
            return await asyncio.to_thread(self._embeddings.embed, texts, pooling, normalize, truncate, cancelled)

    def rerank(self, query: str, documents: Sequence[str]) -> Rows:
        """Return how well documents answer a query, from a model that ranks.

        Query and document are joined as llama.cpp does: by the file's template named "rerank", or with the tokens
        that the model requires between and around two texts.

        Returns:
            float32, shape (documents,), in their order. A higher score is a better answer. The scale depends on the
            model; most return logits.

        Raises:
            Unsupported: the model does not rank.
            Error: as for `embed`.
        """
        return self._embeddings.rerank(query, documents, ThreadEvent())

    async def arerank(self, query: str, documents: Sequence[str]) -> Rows:
        """`rerank` for asyncio, in a thread. Cancelling the task ends the computation at its next decode."""
        with set_on_error() as cancelled:
            return await asyncio.to_thread(self._embeddings.rerank, query, documents, cancelled)

    # --- adapters ------------------------------------------------------------------------

    def load_adapter(self, path: str | Path, *, scale: float = 1.0, **unknown: Never) -> Adapter:
        """Load a LoRA adapter and use it for all requests submitted from then on.

        Works at any time and from any thread. Running and waiting requests are not affected. The cache separates KV
        by the adapters, and their scales, that computed it.

        Args:
            path: a GGUF file.
            scale: how strongly the adapter changes the model. 0.0 for no effect yet.

        Raises:
            AdapterLoadError: the file cannot be loaded, or does not fit this model.
            OptionError: an option is unknown, has the wrong type or is out of range.
            Unsupported: the model's backend has no adapters, or the model only encodes.
            ModelUnloaded: the model is unloaded.
            CalledFromModelThread: a callback in the model's own thread made the call.
        """
        reject_unknown(unknown, ("scale",), "load_adapter")
        return self._adapters.load(path, scale)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The loaded adapters, in the order of loading."""
        return self._adapters.loaded()

    # --- sessions and saving ------------------------------------------------------------

    def end_session(self, session_id: str, *, cache_salt: str | None = None, **unknown: Never) -> bool:
        """Release the cells of a session; return False if it has none.

        Its KV stays in the cache.

        Raises:
            SessionBusy: a request of the session is running or waiting.
        """
        reject_unknown(unknown, ("cache_salt",), "end_session")
        RequestOptions(session_id=session_id)  # checks the name
        return self._runner.end_session(session_id, self._requests.salt(cache_salt))

    def evict(self) -> None:
        """Save the context, wait until it is stored, and release the cells that no request uses.

        Running requests are saved up to their latest token and continue.
        """
        self._runner.evict()

    # --- text --------------------------------------------------------------------------

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False, **unknown: Never
    ) -> NDArray[np.int32]:
        """Return the token ids of a text, int32, shape (n,).

        Args:
            text: text, or its bytes.
            add_special: add the BOS and EOS that the model requires.
            parse_special: parse the text of special tokens as those tokens. A BOS or EOS that the text contains is
                then not added again.
        """
        reject_unknown(unknown, ("add_special", "parse_special"), "tokenize")
        self._runner.check()
        if not isinstance(text, str | bytes):
            raise PromptError(f"{shown(text)} is not text")
        add_special, parse_special = boolean("add_special", add_special), boolean("parse_special", parse_special)
        if add_special and parse_special:
            return self._prompts.tokenize(text)
        return self._vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(
        self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False, **unknown: Never
    ) -> str:
        """Return the text of token ids. Bytes that are not valid UTF-8 become U+FFFD.

        Args:
            tokens: ids, shape (n,).
            special: include the text of special tokens, which is otherwise left out.
        """
        reject_unknown(unknown, ("special",), "detokenize")
        self._runner.check()
        raw = self._vocabulary.detokenize(self._prompts.checked_ids(tokens), special=boolean("special", special))
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, also of a special one. They may be a part of a character."""
        self._runner.check()
        ids = self._prompts.checked_ids([token])
        return self._vocabulary.piece(token) or self._vocabulary.detokenize(ids, special=True)

    # --- state: reading these never waits -------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Size of the context in tokens."""
        return self._backend.limits.n_ctx

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary in tokens."""
        return self._vocabulary.n_tokens

    @property
    def phase(self) -> Phase:
        """What the model does now: "idle", "prefilling" or "generating"."""
        return self._runner.phase

    @property
    def pending(self) -> int:
        """Number of waiting requests."""
        return self._runner.pending

    @property
    def queue_depth(self) -> int:
        """Number of admitted requests: those that compute, or wait for another to compute a prefix they share."""
        return self._runner.running

    @property
    def last_cache_hit(self) -> CacheHit | None:
        """Cache hit of the latest request's prompt; None before the first request."""
        return self._runner.last_hit

    @property
    def metrics(self) -> EngineMetrics:
        """Counts since the model was loaded."""
        return self._runner.metrics

    @property
    def restarts(self) -> int:
        """How many times the model's process was replaced; 0 for a model in this process."""
        return self._runner.restarts

    @property
    def info(self) -> ModelInfo:
        """Properties and current state of the model."""
        facts = getattr(self._backend, "facts", None) or ModelFacts()
        class_name = getattr(self._backend, "class_name", type(self._backend).__name__)
        return ModelInfo(
            **{field.name: getattr(facts, field.name) for field in fields(ModelFacts)},
            id=self.id,
            backend=str(self._backend.namespace.get("backend", class_name)),
            description=str(getattr(self._backend, "description", "")),
            vocab_only=bool(getattr(self._backend, "vocab_only", False)),
            n_ctx=self.n_ctx,
            n_vocab=self.n_vocab,
            n_seq_max=self._n_seq_max,
            phase=self.phase,
            pending=self.pending,
            queue_depth=self.queue_depth,
            cache_problem=self._runner.cache_problem,
            pid=self._runner.pid,
        )

    @property
    def metadata(self) -> Mapping[str, object]:
        """All metadata of the model file, with `overrides` applied; empty if the backend has none.

        Values are numbers, texts, bools, lists of texts, and arrays of numbers.
        """
        return getattr(self._backend, "metadata", None) or MappingProxyType({})

    def cached_prefix(self, prompt: Prompt, *, cache_salt: str | None = None, **unknown: Never) -> int:
        """Return how many tokens of a prompt the cache has. Does not wait for the model.

        For routers. KV that is only in the context, and not yet saved, does not count.
        """
        reject_unknown(unknown, ("cache_salt",), "cached_prefix")
        ids = self._prompts.ids(prompt)
        return self._runner.cached_prefix(self._requests.namespace(cache_salt), ids)

    @property
    def _vocabulary(self) -> Vocabulary:
        return self._backend.vocabulary

    # --- start and end -------------------------------------------------------------------

    def _warm_up(self) -> None:
        if self._backend.limits.can_generate:
            self._runner.warm_up()

    def unload(self) -> None:
        """Unload the model. Running and waiting requests fail with ModelUnloaded. Idempotent.

        The contexts of those requests are saved, within the policy's `evict_save_timeout_ms`. In a signal handler
        that interrupts a call of this library, the method returns at once and a thread unloads the model.
        """
        if reentered():
            # Not threading.Thread: the interrupted call may hold the locks that its start() takes.
            self._runner.begin_to_stop()
            start_new_thread(self._unload, ())
        else:
            self._unload()

    def _begin_to_unload(self) -> bool:
        """Make the model thread unload the model, and return whether it was loaded.

        Returns at once: the garbage collector calls it, in any thread.
        """
        runner: ModelRunner | None = getattr(self, "_runner", None)
        if runner is None or runner.stopped or not runner.is_ours:
            return False
        self._registry.remove_dropped(self, runner)
        runner.begin_to_stop()
        return True

    def _unload(self) -> None:
        try:
            self._embeddings.close()
        finally:
            self._runner.stop()
            self._registry.remove(self)
