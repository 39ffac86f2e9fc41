"""A model file: its check, its load, and its vocabulary, templates, metadata and facts.

The backend uses it and creates a context. `VocabularyFile` uses it without a context, for a model that is loaded
only for its vocabulary.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import NamespaceValue
from erllama.engine.backend import Buffer, InfillTokens, Limits, ModelFacts, SpecialToken
from erllama.engine.backends.gguf_parts import parts
from erllama.engine.backends.llama_library import llama_ffi, translate_errors
from erllama.engine.backends.llama_options import LlamaOptions
from erllama.errors import LoadCancelled, ModelLoadError, OptionError, PromptError

_TEMPLATE = "tokenizer.chat_template"
_CHUNK_BYTES = 4096  # bytes of each tensor: one page, the smallest unit that a read costs
# libllama's log line, for example "load_tensors:   CPU_Mapped model buffer size =     0.44 MiB".
_BUFFER = re.compile(r"(\S+) +(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
_HOLDS = {"model": "weights", "KV": "kv", "RS": "state", "compute": "compute", "output": "output"}


class LlamaVocabulary:
    """A model's vocabulary.

    Attributes:
        special_tokens: special tokens by name, such as "bos".
        special_texts: the texts of special tokens for chat templates, by name, such as "bos_token".
        infill_tokens: the tokens that mark a gap in a text; None if the model has none.
        longest_piece: maximum bytes of a text that one token represents; 0 without a limit.
    """

    def __init__(self, vocabulary: llama_ffi.Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.n_tokens = vocabulary.n_tokens
        self.is_eog = vocabulary.is_eog
        self.special_tokens = {
            name: SpecialToken(id, vocabulary.text(id)) for name, id in vocabulary.special_token_ids.items()
        }
        in_templates = [name for name in ("bos", "eos", "pad") if name in self.special_tokens]
        self.special_texts = {f"{name}_token": self.special_tokens[name].text for name in in_templates}
        self.longest_piece = vocabulary.longest_piece
        self.infill_tokens: InfillTokens | None = None
        pre, suf, mid = vocabulary.fim_pre, vocabulary.fim_suf, vocabulary.fim_mid
        if pre is not None and suf is not None and mid is not None:
            begin = (vocabulary.bos,) if vocabulary.add_bos and vocabulary.bos is not None else ()
            self.infill_tokens = InfillTokens(begin, pre, suf, mid)

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        with translate_errors(PromptError):
            return self._vocabulary.tokenize(source, add_special=add_special, parse_special=parse_special)

    def piece(self, token: int) -> bytes:
        try:
            return self._vocabulary.piece(token)
        except llama_ffi.LlamaError as error:
            raise PromptError(str(error)) from error

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        with translate_errors(PromptError):
            return self._vocabulary.detokenize(tokens, special=special)


class LoadedFile(NamedTuple):
    """A file that libllama has loaded, and its metadata with the overrides.

    `n_positions` is the number of learned positions, or None if positions are computed. A longer sequence would
    fail an assertion in libllama.
    """

    model: llama_ffi.LlamaModel
    metadata: Mapping[str, object]
    n_positions: int | None = None


def load_file(
    path: Path,
    options: LlamaOptions,
    on_progress: Callable[[float], object] | None = None,
    *,
    vocab_only: bool = False,
) -> LoadedFile:
    """Check a GGUF file's header and load it.

    Raises:
        ModelLoadError: the file is missing, not a regular file, not GGUF, damaged, or of a kind unknown to
            libllama.
        OptionError: an option contradicts the file, or an override has no effect.
        LoadCancelled: `on_progress` returned False.
    """
    metadata, n_positions = check_header(path, options, vocab_only=vocab_only)
    try:
        model = llama_ffi.LlamaModel(
            path,
            n_gpu_layers=options.n_gpu_layers,
            devices=[] if vocab_only else [number for number, _ in options.offload_devices()],
            split_mode=options.split_mode,
            main_gpu=options.main_gpu or 0,
            tensor_split=options.tensor_split,
            overrides=options.overrides,
            mmap=options.mmap,
            mlock=options.mlock,
            vocab_only=vocab_only,
            on_progress=on_progress,
        )
    except llama_ffi.LoadCancelledError as error:
        raise LoadCancelled(f"{path}: {error}") from None
    except llama_ffi.UnusedOverrideError as error:
        raise OptionError(_unused_override_message(error, metadata, vocab_only)) from None
    except llama_ffi.LlamaError as error:
        raise _load_error(path, error) from error
    return LoadedFile(model, metadata, n_positions)


class CheckedHeader(NamedTuple):
    """A header's metadata with the overrides, and the number of learned positions as in `LoadedFile`."""

    metadata: Mapping[str, object]
    n_positions: int | None


def check_header(path: Path, options: LlamaOptions, *, vocab_only: bool = False) -> CheckedHeader:
    """Check what can be checked before a load: a file's header, and the options against it. Reads no weights.

    Raises:
        ModelLoadError: the file is missing, not a regular file, not GGUF, damaged, or of a kind unknown to
            libllama.
        OptionError: an option contradicts the file.
    """
    check_file(path)
    n_positions = None
    try:
        header = llama_ffi.check_header(path, options.overrides)
        llama_ffi.check_hyperparameters(header.metadata)
        if not vocab_only:
            options.check_against_file(header.metadata)
            tensors = _all_tensors(path, header)
            llama_ffi.check_tensors(header.metadata, tensors)
            n_positions = next((each.shape[1] for each in tensors if each.name == "position_embd.weight"), None)
    except llama_ffi.LlamaError as error:
        raise _load_error(path, error) from error
    return CheckedHeader(header.metadata, n_positions)


def _load_error(path: Path, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{path} cannot be loaded: {error}. Check that the file is complete and of a supported kind"
    )


def _all_tensors(path: Path, header: llama_ffi.GGUFHeader) -> list[llama_ffi.Tensor]:
    """Return the tensors of all parts that exist. libllama reports missing parts."""
    others = [part for part in parts(path) if part != path and part.exists()]
    return [*header.tensors, *(tensor for part in others for tensor in llama_ffi.read_tensor_table(part)[1])]


def _unused_override_message(
    error: llama_ffi.UnusedOverrideError, metadata: Mapping[str, object], vocab_only: bool
) -> str:
    if error.reason:
        return f"overrides[{error.key!r}] has the wrong type: libllama {error.reason}"
    near = get_close_matches(error.key, [key for key in metadata if key != error.key], n=1, cutoff=0.8)
    hint = f"did you mean {near[0]!r}?" if near else "leave it out"
    return f"overrides[{error.key!r}] has no effect: libllama does not read this key from this file" + (
        f" for a vocabulary only; {hint}" if vocab_only else f"; {hint}"
    )


def check_file(path: Path) -> None:
    """Raise ModelLoadError unless `path` is a readable file with the GGUF magic."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ModelLoadError(f"{path} is not a regular file; pass a GGUF file")
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist; pass the path of a GGUF file") from None
    except IsADirectoryError:
        raise ModelLoadError(f"{path} is a directory; pass the GGUF file in it") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    if not magic:
        raise ModelLoadError(f"{path} is empty; pass a complete GGUF file")
    if magic != b"GGUF":
        raise ModelLoadError(
            f"{path} is not a GGUF file: it begins with {magic!r}. Convert the model to GGUF first"
        )


def sampled_digest(path: Path) -> str:
    """Return the SHA-256, in hex, of a GGUF file's size, its header, and the first 4 KiB of each tensor.

    Raises:
        ModelLoadError: the file cannot be read, or is not GGUF.
    """
    try:
        with translate_errors(ModelLoadError, f"{path} cannot be loaded"):
            data_offset, tensors = llama_ffi.read_tensor_table(path)
        digest = hashlib.sha256(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(data_offset))
            for tensor in tensors:
                file.seek(data_offset + tensor.offset)
                digest.update(file.read(min(tensor.n_bytes, _CHUNK_BYTES)))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()


def chat_templates(metadata: Mapping[str, object]) -> dict[str, str]:
    """Return a file's chat templates by name: "default", and others such as "tool_use"."""
    return {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": source
        for key, source in metadata.items()
        if isinstance(source, str) and source and (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."))
    }


def facts_of(path: Path, file: LoadedFile, special_tokens: Mapping[str, SpecialToken]) -> ModelFacts:
    """Return the facts of a loaded file, without those of a context and devices."""
    model, metadata, _ = file
    architecture = str(metadata.get("general.architecture", ""))

    def size(name: str) -> int:
        value = metadata.get(f"{architecture}.{name}")
        if isinstance(value, np.ndarray) and value.size:  # a value per layer
            value = value.max().item()
        return int(value) if isinstance(value, int | float) else 0

    n_head = size("attention.head_count")
    return ModelFacts(
        architecture=architecture,
        name=str(metadata.get("general.name", "")),
        quantization=model.file_type if not model.vocab_only else "",
        n_params=model.shape.n_params,
        file_bytes=sum(part.stat().st_size for part in parts(path) if part.exists()),
        n_ctx_train=size("context_length"),
        n_layer=size("block_count"),
        n_embd=size("embedding_length"),
        n_head=n_head,
        n_head_kv=size("attention.head_count_kv") or n_head,
        has_chat_template="default" in chat_templates(metadata),
        special_tokens=special_tokens,
        buffers=buffers_in(model.log),
        weights_bytes=0 if model.vocab_only else model.shape.n_bytes,
    )


def buffers_in(log: str) -> tuple[Buffer, ...]:
    """Return the memory that libllama reports in its log, to a hundredth of a MiB."""
    return tuple(
        Buffer(place, _HOLDS[purpose], round(float(mebibytes) * 2**20))
        for place, purpose, mebibytes in _BUFFER.findall(log)
    )


class VocabularyFile:
    """A GGUF file loaded for its vocabulary, templates and metadata, without weights and context.

    Has the descriptive attributes of a backend.

    Args:
        path: the GGUF file. It need not have weights.
        options: only `overrides` has an effect.
        on_progress: called with 0.0 and 1.0; returning False cancels.

    Raises:
        ModelLoadError: the file cannot be loaded.
        OptionError: an override has no effect.
    """

    vocab_only = True

    def __init__(
        self, path: Path, options: LlamaOptions, on_progress: Callable[[float], object] | None = None
    ) -> None:
        file = load_file(path, options, on_progress, vocab_only=True)
        self._model = file.model
        try:
            self.metadata = file.metadata
            self.vocabulary = LlamaVocabulary(file.model.vocabulary)
            self.chat_templates = chat_templates(file.metadata)
            self.facts = facts_of(path, file, self.vocabulary.special_tokens)
        except BaseException:
            file.model.close()
            raise
        n_vocab = self.vocabulary.n_tokens
        self.limits = Limits(n_ctx=0, n_batch=0, n_ubatch=0, n_vocab=n_vocab, can_trim=False, n_sequences=0)
        # No KV is ever stored under this namespace.
        self.namespace: Mapping[str, NamespaceValue] = {"backend": "llama", "vocabulary": str(path)}
        self.description = f"{self.facts.architecture}, vocabulary only"

    def close(self) -> None:
        self._model.close()
