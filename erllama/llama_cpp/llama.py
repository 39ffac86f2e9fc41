"""`Llama`: a model with the interface of `llama_cpp.Llama`, which runs on erllama and its cache."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Never, cast

import numpy as np
from numpy.typing import NDArray

from erllama._model.default_cache import default_cache
from erllama._model.load import load_model
from erllama._model.model import Model
from erllama._model.requests.scoring import infill_prompt
from erllama.cache import Cache
from erllama.checks import import_optional, integer, shown
from erllama.errors import OptionError, PromptError, Unsupported
from erllama.llama_cpp import constants
from erllama.llama_cpp.chats import ChatRun, clean_messages, format_schema, tool_options
from erllama.llama_cpp.completions import TextCompletion
from erllama.llama_cpp.generation import TokenLevel
from erllama.llama_cpp.llama_cache import BaseLlamaCache
from erllama.llama_cpp.llama_chat_format import STOPS, template_of
from erllama.llama_cpp.llama_grammar import LlamaGrammar
from erllama.llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from erllama.llama_cpp.llama_tokenizer import LlamaTokenizer
from erllama.llama_cpp.llama_types import (
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
    CreateEmbeddingResponse,
)
from erllama.llama_cpp.loading import POOLINGS, check_extra_options, checked_path, checked_pooling, load_options
from erllama.llama_cpp.sampling import (
    LogitsProcessor,
    LogitsProcessorList,
    SamplingArguments,
    StoppingCriteria,
    StoppingCriteriaList,
    seed_of,
)
from erllama.llama_cpp.tool_prompting import needs_tool_prompt, with_tool_prompt
from erllama.models.download.hub import StrPath, pull_from_hub

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

Vector = list[float] | list[list[float]]
_MAX_SPECULATIVE = 64


class Llama(TokenLevel):
    """A model, with the constructor and the methods of `llama_cpp.Llama`.

    Args:
        model_path: the model file.
        n_gpu_layers, split_mode, main_gpu, tensor_split: as in llama-cpp-python.
        vocab_only: load the vocabulary and no weights.
        use_mmap, use_mlock: map the file, and keep it from being swapped out.
        kv_overrides: metadata that overrides the file's.
        seed: the seed from which completions without a seed derive theirs.
        n_ctx: size of the context in tokens, rounded up to a multiple of 256. 0 for the training context.
        n_batch, n_ubatch: tokens of one decode, and tokens computed at once.
        n_threads, n_threads_batch: threads. None for erllama's choice.
        rope_scaling_type, rope_freq_base, rope_freq_scale: RoPE; the defaults stand for the model's own values.
        yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow, yarn_orig_ctx: YaRN, likewise.
        pooling_type: how `embed` joins the vectors of a text's tokens.
        logits_all, embedding: accepted. Log-probabilities and embeddings are available without them.
        offload_kqv: False only without layers on GPUs.
        flash_attn: True or False. None, the default, for libllama's choice.
        swa_full: allocate cells of the whole context for layers with a sliding window, too.
        no_perf, verbose: accepted. Log messages go to the logger `erllama`, and nothing is printed.
        last_n_tokens_size: number of tokens to which penalties apply.
        lora_path, lora_scale: a LoRA adapter.
        chat_format: name of a format of `llama_chat_format.CHAT_FORMATS`. None for the model's own template.
        draft_model: proposes tokens for speculative decoding.
        type_k, type_v: types of the KV cells, as GGML_TYPE_ numbers.
        cache: an erllama.Cache, for this model's prompts. None for a cache in memory and in the user's cache
            directory, or that of ERLLAMA_CACHE_DIR.
        attention_type, op_offload, lora_base, numa, chat_handler, tokenizer, spm_infill: refused, with the reason,
            unless they have their default.

    Raises:
        OptionError: an option cannot be honoured, is unknown, or the file does not exist. It is a ValueError.
        ModelLoadError: the file cannot be loaded.

    Attributes:
        model_path, verbose, last_n_tokens_size, chat_format, draft_model: as passed.
        metadata: the metadata of the file as texts, without arrays.
        cache: the cache of `set_cache`; None without one.
        context_params, model_params: the options in use.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        split_mode: int = constants.LLAMA_SPLIT_MODE_LAYER,
        main_gpu: int = 0,
        tensor_split: list[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        seed: int = constants.LLAMA_DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = constants.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
        pooling_type: int = constants.LLAMA_POOLING_TYPE_UNSPECIFIED,
        attention_type: int = constants.LLAMA_ATTENTION_TYPE_UNSPECIFIED,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool | None = None,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: None = None,
        draft_model: LlamaDraftModel | None = None,
        tokenizer: None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> None:
        values = {name: value for name, value in locals().items() if name not in ("self", "model_path", "kwargs")}
        check_extra_options(kwargs, values)
        path = checked_path(model_path)
        self._pooling = checked_pooling(pooling_type)
        self._seed = integer("seed", seed) or constants.LLAMA_DEFAULT_SEED
        self._values, self._own_cache = values, cache
        self._options = load_options(path, values)
        self._speculation = _speculation(draft_model)
        self.model_path = os.fspath(model_path)
        self.verbose, self.last_n_tokens_size, self.draft_model = verbose, last_n_tokens_size, draft_model
        self.cache: BaseLlamaCache | None = None
        self._tokens: list[int] = []
        self._model = self._load(cache)
        self.chat_format = self._checked_format(chat_format)
        self.metadata = _texts(self._model.metadata)
        self.model_params = SimpleNamespace(**values)
        self.context_params = SimpleNamespace(**{**values, **self._options, "n_ctx": self.n_ctx()})

    def _load(self, cache: Cache | None) -> Model:
        model = load_model(checked_path(self.model_path), cache=cache or default_cache(), **self._options)
        lora = self._values["lora_path"]
        if lora is not None:
            try:
                model.load_adapter(lora, scale=self._values["lora_scale"])
            except BaseException:
                model.unload()
                raise
        return model

    def _checked_format(self, chat_format: str | None) -> str:
        """Return the name of the chat format; raise OptionError for one that has no template."""
        if chat_format is None:
            return _OWN_TEMPLATE if self._model.info.has_chat_template else "llama-2"
        if not chat_format.startswith(_TEMPLATE_PREFIX):
            template_of(chat_format)
        return chat_format

    @property
    def erllama_model(self) -> Model:
        """The erllama.Model, for what llama-cpp-python does not have. `set_cache` replaces it."""
        return self._model

    # --- tokens --------------------------------------------------------------------------

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the token ids of a text in UTF-8.

        Args:
            add_bos: add the BOS that the model requires.
            special: parse the text of special tokens as those tokens.
        """
        if not isinstance(text, bytes):
            raise PromptError(f"{shown(text)} is not bytes; encode it, or use Llama.tokenizer()")
        ids: list[int] = self._model.tokenize(text, add_special=add_bos, parse_special=special).tolist()
        return ids

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of tokens. The space that some tokenizers add after the BOS is left out.

        Args:
            prev_tokens: accepted; the tokens before do not change the bytes.
            special: include the text of special tokens.
        """
        ids = [int(token) for token in tokens]
        piece = self._model.token_bytes if special else self._model._vocabulary.piece
        if any(not 0 <= token < self.n_vocab() for token in ids):
            raise PromptError(f"{shown(ids)} has an id outside the vocabulary of {self.n_vocab()} tokens")
        text = b"".join(map(piece, ids))
        return text.removeprefix(b" ") if ids[:1] == [self.token_bos()] else text

    def tokenizer(self) -> LlamaTokenizer:
        """Return the tokenizer of this model."""
        return LlamaTokenizer(self)

    def n_ctx(self) -> int:
        """Return the size of the context in tokens."""
        return self._model.n_ctx

    def n_embd(self) -> int:
        """Return the width of a token's embedding."""
        return self._model.info.n_embd

    def n_vocab(self) -> int:
        """Return the size of the vocabulary in tokens."""
        return self._model.n_vocab

    def token_bos(self) -> int:
        """Return the id of the token that begins a text; -1 without one."""
        return self._special("bos")

    def token_eos(self) -> int:
        """Return the id of the token that ends a text; -1 without one."""
        return self._special("eos")

    def token_nl(self) -> int:
        """Return the id of the token of a line end; -1 without one."""
        return self._special("nl")

    def _special(self, purpose: str) -> int:
        token = self._model.info.special_tokens.get(purpose)
        return -1 if token is None else token.id

    # --- completions ---------------------------------------------------------------------

    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: StoppingCriteriaList | StoppingCriteria | None = None,
        logits_processor: LogitsProcessorList | LogitsProcessor | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
    ) -> CreateCompletionResponse | Iterator[CreateCompletionResponse]:
        """Complete a prompt.

        Args:
            prompt: text, to which the model's BOS is added, or token ids.
            suffix: a text that follows the reply, for models that fill gaps.
            max_tokens: maximum number of tokens of the reply. None or 0 for as many as the context holds.
            temperature: randomness of the sampling. 0 takes the most likely token; below 0, all tokens may follow.
            top_p, min_p, typical_p, top_k: filters of candidates.
            logprobs: return the log-probability of each token and this many of the most likely ones.
            echo: begin the text with the prompt. Not with `logprobs`, and not in streams.
            stop: texts at which the reply ends.
            frequency_penalty, presence_penalty, repeat_penalty: make recent tokens less likely.
            stream: return an iterator over chunks. The request runs while it is read.
            seed: seed of the sampling. None derives one from the constructor's or from `set_seed`.
            tfs_z: only 1.0.
            mirostat_mode, mirostat_tau, mirostat_eta: mirostat.
            model: the model's name in the result. None for `model_path`.
            stopping_criteria: functions of tokens and logits. The reply ends when one returns True.
            logits_processor: functions of tokens and logits that return logits. They run in the model's thread.
            grammar: a grammar that the reply follows.
            logit_bias: values added to logits, by token id.

        Returns:
            a dictionary with "choices" and "usage", or an iterator over dictionaries.

        Raises:
            PromptTooLong: the prompt fills the context. It is a ValueError.
            OptionError: an option cannot be honoured, has the wrong type or is out of range. It is a ValueError.
            Unsupported: `suffix`, and the model does not fill gaps.
        """
        if echo and logprobs is not None:
            raise OptionError(
                "echo with logprobs asks for log-probabilities of the prompt; use erllama's Model.score"
            )
        ids = self._prompt_ids(prompt, suffix)
        self._check_room(ids)
        arguments: SamplingArguments = {
            "temp": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "top_k": top_k,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "repeat_penalty": repeat_penalty,
            "tfs_z": tfs_z,
            "mirostat_mode": mirostat_mode,
            "mirostat_tau": mirostat_tau,
            "mirostat_eta": mirostat_eta,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "grammar": grammar,
            "logit_bias": logit_bias,
        }
        watch, options = self._sampling(arguments)
        n_room = self.n_ctx() - len(ids)
        options |= {
            "seed": self._next_seed(seed),
            "max_tokens": min(max_tokens, n_room) if max_tokens and max_tokens > 0 else n_room,
            "stop": stop or (),
            "logprobs": logprobs,
        }
        text = prompt if isinstance(prompt, str) else self._model.detokenize(prompt) if echo else ""
        completion = TextCompletion(
            self._model,
            self.model_path if model is None else model,
            ids,
            options,
            before=text if echo and not stream else "",
            offset=len(prompt),
            watch=watch,
            on_end=lambda tokens: self._set_tokens([*ids, *tokens]),
        )
        return completion.chunks() if stream else completion.whole()

    __call__ = create_completion

    def _prompt_ids(self, prompt: object, suffix: str | None) -> list[int]:
        if suffix is not None:
            ids: list[int] = infill_prompt(prompt, suffix, self._model._vocabulary, self._model.id).tolist()
            return ids
        if not isinstance(prompt, str):
            return list(prompt) if isinstance(prompt, Sequence | np.ndarray) else [cast(Never, prompt)]
        found: list[int] = self._model.tokenize(prompt, parse_special=True).tolist()
        return found

    def _next_seed(self, seed: int | None) -> int | None:
        """Return the seed of a completion, derived from the last one as llama-cpp-python derives it."""
        self._seed = random.Random(self._seed).randint(0, 2**32) if seed is None else integer("seed", seed)
        return seed_of(self._seed)

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, object]],
        functions: Sequence[Mapping[str, object]] | None = None,
        function_call: str | Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: str | Mapping[str, object] | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        response_format: Mapping[str, object] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: LogitsProcessorList | LogitsProcessor | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]:
        """Reply to a conversation; options as for `create_completion`, and these:

        Args:
            messages: the conversation in OpenAI's form.
            functions, function_call: the older form of `tools` and `tool_choice`.
            tools: tools that the reply may call. Calls in the reply are read for every model.
            tool_choice: "auto", "none", "required", or the tool that the reply must call.
            response_format: {"type": "json_object"}, with a "schema" or without; OpenAI's "json_schema"; or "text".
            logprobs, top_logprobs: whether to return log-probabilities, and how many of the most likely tokens.

        Returns:
            a dictionary with "choices" and "usage", or an iterator over dictionaries.

        Raises:
            ChatError: the messages or tools are invalid. It is a ValueError.
            Error: as for `create_completion`.
        """
        schema = format_schema(response_format)
        if schema is not None and grammar is not None:
            raise OptionError("response_format and grammar both constrain the reply; pass one of them")
        arguments: SamplingArguments = {
            "temp": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "top_k": top_k,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "repeat_penalty": repeat_penalty,
            "tfs_z": tfs_z,
            "mirostat_mode": mirostat_mode,
            "mirostat_tau": mirostat_tau,
            "mirostat_eta": mirostat_eta,
            "logits_processor": logits_processor,
            "grammar": grammar,
            "logit_bias": logit_bias,
        }
        _, options = self._sampling(arguments)
        options |= tool_options(functions, function_call, tools, tool_choice) | self._template()
        texts = [stop] if isinstance(stop, str) else list(stop or ())
        options |= {
            "seed": self._next_seed(seed),
            "max_tokens": max_tokens if max_tokens and max_tokens > 0 else None,
            "stop": [*texts, *STOPS.get(self.chat_format, ())],
            "logprobs": (top_logprobs or 0) if logprobs else None,
        }
        if schema is not None:
            options["json_schema"] = schema
        conversation = clean_messages(messages)
        if needs_tool_prompt(self._model, options):
            conversation, options = with_tool_prompt(self._model, conversation, options)
        chat = ChatRun(
            self._model,
            self.model_path if model is None else model,
            conversation,
            options,
            on_end=self._set_tokens,
        )
        return chat.chunks() if stream else chat.whole()

    def _template(self) -> dict[str, Any]:
        if self.chat_format == _OWN_TEMPLATE:
            return {}
        if self.chat_format.startswith(_TEMPLATE_PREFIX):
            return {"chat_template": self.chat_format.removeprefix(_TEMPLATE_PREFIX)}
        return {"chat_template": template_of(self.chat_format)}

    def create_chat_completion_openai_v1(
        self,
        *args: Any,  # noqa: ANN401 - those of create_chat_completion
        **kwargs: Any,  # noqa: ANN401 - likewise
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """`create_chat_completion` with the types of the package `openai` as results.

        Raises:
            MissingPackage: `openai` is not installed.
        """
        types = import_optional(
            "openai.types.chat", needed_by="create_chat_completion_openai_v1", package="openai", install="openai"
        )
        result = self.create_chat_completion(*args, **kwargs)
        if isinstance(result, dict):
            return cast("ChatCompletion", types.ChatCompletion(**result))
        return (types.ChatCompletionChunk(**chunk) for chunk in result)

    # --- embeddings ----------------------------------------------------------------------

    def embed(
        self, input: str | list[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:  # noqa: ANN401 - the shape depends on input, pooling and return_count
        """Return the vectors of texts.

        Args:
            input: a text, or several.
            normalize: scale each vector to length 1.
            truncate: cut texts that are too long instead of raising PromptTooLong.
            return_count: also return the number of tokens.

        Returns:
            a list of numbers for a text, a list of them for several; without pooling, a vector per token. With
            return_count, a pair of that and the number of tokens.
        """
        texts = [input] if isinstance(input, str) else list(input)
        rows = self._model.embed(
            texts, pooling=cast(Any, self._pooling_name()), normalize=normalize, truncate=truncate
        )
        vectors: list[Vector] = [row.tolist() for row in rows]
        found: Vector | list[Vector] = vectors[0] if isinstance(input, str) else vectors
        if not return_count:
            return found
        n_most = self.n_ctx()
        return found, sum(min(len(self._model.tokenize(text, parse_special=True)), n_most) for text in texts)

    def create_embedding(self, input: str | list[str], model: str | None = None) -> CreateEmbeddingResponse:
        """Return the vectors of texts in OpenAI's form; errors as for `embed`."""
        texts = [input] if isinstance(input, str) else list(input)
        vectors, n_tokens = self.embed(texts, return_count=True)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "embedding": vector, "index": index} for index, vector in enumerate(vectors)
            ],
            "model": self.model_path if model is None else model,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    def pooling_type(self) -> int:
        """Return how `embed` joins the vectors of a text's tokens, as a LLAMA_POOLING_TYPE_ number."""
        named = self._pooling_name()
        if named is not None:
            return next(number for number, name in POOLINGS.items() if name == named)
        return int(cast(int, self._model.metadata[self._pooling_key()]))

    def _pooling_name(self) -> str | None:
        """Return how vectors are pooled; None for what the file names. A file that names none has no pooling."""
        if self._pooling is not None or self._pooling_key() in self._model.metadata:
            return self._pooling
        return "none"

    def _pooling_key(self) -> str:
        return f"{self._model.info.architecture}.pooling_type"

    # --- cache and lifetime --------------------------------------------------------------

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Use a cache for the prompts of this model. None for the one of the constructor.

        The model is loaded again on the cache. Its file is in memory already, so that takes little time.
        """
        if cache is not None and not isinstance(cache, BaseLlamaCache):
            raise OptionError(f"set_cache({shown(cache)}); pass a LlamaRAMCache, a LlamaDiskCache, or None")
        if self._options.get("vocab_only"):
            raise Unsupported("a model with vocab_only computes no prompts, so it has no use for a cache")
        self._model.unload()
        self._model = self._load(self._own_cache if cache is None else cache.cache)
        self.cache = cache

    def close(self) -> None:
        """Unload the model. Its prompts stay in the cache. Idempotent."""
        model = getattr(self, "_model", None)
        if model is not None:
            model.unload()

    def __del__(self) -> None:
        model = getattr(self, "_model", None)
        if model is not None:
            model._begin_to_unload()

    def __getstate__(self) -> dict[str, object]:
        if self._own_cache is not None:
            raise Unsupported("a Llama with cache= cannot be pickled; use ERLLAMA_CACHE_DIR for the directory")
        return {"model_path": self.model_path, **self._values, "seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        additional_files: list[str] | None = None,
        local_dir: StrPath | None = None,
        local_dir_use_symlinks: bool | Literal["auto"] = "auto",
        cache_dir: StrPath | None = None,
        **kwargs: Any,  # noqa: ANN401 - the options of Llama
    ) -> Llama:
        """Download a model from the Hugging Face hub, unless it is on this machine, and load it.

        Args:
            repo_id: the repository, such as "org/name".
            filename: the model file, or a pattern that one file matches, such as "*Q4_K_M.gguf".
            additional_files: further files, or patterns that one file each matches. All parts of a split model are
                downloaded without it.
            local_dir: directory for the files. None for the hub's cache.
            local_dir_use_symlinks: only "auto": the hub no longer has this option.
            cache_dir: directory of the hub's cache.
            kwargs: options of `Llama`.

        Raises:
            DownloadError: no model, or more than one, matches; or the download fails, or its digest is wrong.
            MissingPackage: huggingface_hub is not installed.
        """
        if local_dir_use_symlinks != "auto":
            raise OptionError("local_dir_use_symlinks cannot be honoured: huggingface_hub removed it; leave it out")
        path = pull_from_hub(
            repo_id,
            filename,
            cache_dir=cache_dir,
            local_dir=local_dir,
            additional_files=additional_files or (),
        )
        return cls(path, **kwargs)

    @staticmethod
    def logits_to_logprobs(logits: NDArray[np.single] | list[float], axis: int = -1) -> NDArray[np.single]:
        """Return the logarithm of the softmax of logits along an axis."""
        values = np.asarray(logits, np.single)
        largest = values.max(axis=axis, keepdims=True)
        shifted = values - np.where(np.isfinite(largest), largest, 0)
        with np.errstate(divide="ignore"):
            found: NDArray[np.single] = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
        return found

    @staticmethod
    def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
        """Return the length of the longest common prefix."""
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# The names under which llama-cpp-python has the templates of a model's file.
_TEMPLATE_PREFIX = "chat_template."
_OWN_TEMPLATE = "chat_template.default"


def _speculation(draft_model: object) -> dict[str, Any]:
    """Return the options of speculation for a draft model."""
    if draft_model is None:
        return {}
    if isinstance(draft_model, LlamaPromptLookupDecoding):
        n_tokens = min(draft_model.num_pred_tokens, _MAX_SPECULATIVE)
        return {"speculative": _drafts(draft_model), "speculative_tokens": n_tokens}
    if not callable(draft_model):
        raise OptionError(f"draft_model={shown(draft_model)}; pass a LlamaDraftModel, or a function of token ids")
    return {"speculative": _drafts(draft_model)}


def _drafts(draft_model: Callable[..., NDArray[np.intc]]) -> Callable[[NDArray[np.int32], int], list[int]]:
    def draft(tokens: NDArray[np.int32], n: int) -> list[int]:
        found: list[int] = np.asarray(draft_model(tokens)).astype(int)[:n].tolist()
        return found

    return draft


def _texts(metadata: Mapping[str, object]) -> dict[str, str]:
    """Return metadata as texts. libllama has no texts of arrays."""
    texts = {}
    for name, value in metadata.items():
        if isinstance(value, bool):
            texts[name] = str(value).lower()
        elif isinstance(value, float):
            texts[name] = f"{value:f}"
        elif isinstance(value, int | str):
            texts[name] = str(value)
    return texts
