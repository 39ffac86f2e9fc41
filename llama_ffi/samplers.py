"""libllama's own samplers, one at a time, for comparisons with other implementations.

The engine does not use them; tests and benchmarks do. Arguments that would fail an assertion in libllama, or make
it read out of range, raise `LlamaError`. A sampler has state. Any thread may use it, and a lock makes a second
thread wait.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from erllama.llama_ffi.handle import Handle
from erllama.llama_ffi.library import LlamaError, check, drain_log, ffi, last_error, lib, start
from erllama.llama_ffi.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INT32_MAX = 2**31 - 1
_FLOAT_MAX = float(np.finfo(np.float32).max)

# The numeric arguments of each sampler, in order. Those in _INTEGERS are integers within bounds, the others reals.
_NUMBERS = {
    "penalties": ("n_vocab", "last_n", "repeat", "frequency", "presence"),
    "dry": ("multiplier", "base", "allowed_length", "last_n"),
    "top_n_sigma": ("n",),
    "top_k": ("k",),
    "typical": ("p", "min_keep"),
    "top_p": ("p", "min_keep"),
    "min_p": ("p", "min_keep"),
    "xtc": ("probability", "threshold", "min_keep", "seed"),
    "temp": ("temperature",),
    "temp_ext": ("temperature", "spread", "exponent"),
    "mirostat": ("n_vocab", "seed", "tau", "eta", "m"),
    "mirostat_v2": ("seed", "tau", "eta"),
    "dist": ("seed",),
    "greedy": (),
    "grammar": (),
}
_INTEGERS = {
    "n_vocab": (1, _INT32_MAX),
    "token": (0, _INT32_MAX),
    "last_n": (0, 2**24),  # libllama allocates memory for this many at once
    "allowed_length": (0, _INT32_MAX),
    "k": (0, _INT32_MAX),
    "m": (1, _INT32_MAX),
    "min_keep": (0, _INT32_MAX),
    "seed": (0, 2**32 - 2),  # 2**32 - 1 asks for a random seed
}
# The minimum and maximum of texts of a sampler; the others take no text.
_TEXTS = {"dry": (0, 1024), "grammar": (2, 2)}


class SamplerOutput(NamedTuple):
    """The candidates that a sampler left.

    Attributes:
        ids: int32, shape (n,).
        logits: float32, shape (n,). Some samplers exclude a token with -inf.
        probabilities: float32, shape (n,); 0 if the sampler computes none. Some samplers compute them before they
            drop or change candidates.
        in_order: whether libllama knows that the logits fall from first to last.
        selected: the position of the drawn candidate; -1 without a draw.
    """

    ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    in_order: bool
    selected: int


class LlamaSampler:
    """A llama_sampler.

    Args:
        name: the suffix of its function llama_sampler_init_<name> in llama.h: "top_k", "typical", "dry" and so on.
        numbers: its numeric arguments, in order. "logit_bias" takes the size of the vocabulary, then a token and a
            bias for each biased token.
        texts: sequence breakers for "dry"; the rules and the name of the root rule for "grammar".
        vocabulary: required for "dry" and "grammar".

    Raises:
        LlamaError: the name is unknown, a number is out of range, or libllama refused.
    """

    def __init__(
        self, name: str, *numbers: float, texts: Sequence[str] = (), vocabulary: Vocabulary | None = None
    ) -> None:
        names = _names(name, len(numbers))
        values = [_check_number(name, label, number) for label, number in zip(names, numbers, strict=True)]
        self._n_vocab = int(values[names.index("n_vocab")]) if "n_vocab" in names else None
        encoded = _encode_texts(name, texts)
        if (name in _TEXTS) != (vocabulary is not None):
            raise LlamaError(f"the sampler {name} takes {'a' if name in _TEXTS else 'no'} vocabulary")
        if vocabulary is not None:
            self._n_vocab = vocabulary.n_tokens
            if vocabulary.type == "none":
                raise LlamaError(f"the sampler {name} needs a vocabulary, and this model has none")
        if name == "logit_bias" and any(token >= values[0] for token in values[1::2]):
            raise LlamaError(f"token {max(values[1::2]):.0f} is outside the vocabulary of {values[0]:.0f} tokens")
        start()
        texts_at = [ffi.new("char[]", text) for text in encoded]
        model = None if vocabulary is None else vocabulary._model.hold()
        try:
            pointer = lib.erl_sampler_new(
                name.encode(),
                ffi.new("double[]", values),
                len(values),
                ffi.NULL if vocabulary is None else vocabulary._vocab,
                ffi.new("const char *[]", texts_at),
                len(texts_at),
            )
            reason = last_error()
            problems = drain_log()
            if not pointer:
                raise LlamaError(
                    reason or "; ".join(problems[-3:]) or f"libllama could not make the sampler {name}"
                )
        except BaseException:
            if model is not None:
                model.release()
            raise
        self.name = name
        self._lock = threading.RLock()
        self._handle = Handle(pointer, _free_sampler(model), "sampler")
        finalizer = weakref.finalize(self, self._handle.release)
        finalizer.atexit = False  # as for contexts
        self._finalizer: Callable[[], object] = finalizer

    def close(self) -> None:
        """Free the sampler. Idempotent."""
        self._finalizer()

    def __enter__(self) -> LlamaSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Add chosen tokens, or tokens of the prompt, to the sampler's history: ids, shape (n,).

        Raises:
            LlamaError: an id is outside the vocabulary, or a grammar does not allow it.
        """
        ids = self._check_ids(tokens)
        if len(ids):
            with self._lock, self._handle.use() as native:
                pointer = ffi.from_buffer("int32_t[]", ids)
                check(
                    lib.erl_sampler_accept(native, pointer, len(ids)),
                    f"accepting tokens in the sampler {self.name}",
                )

    def apply(
        self,
        ids: Sequence[int] | NDArray[np.integer],
        logits: Sequence[float] | NDArray[np.floating],
        *,
        in_order: bool = False,
    ) -> SamplerOutput:
        """Apply the sampler: drop candidates, change their logits, or draw one.

        Args:
            ids: shape (n,), n >= 1.
            logits: shape (n,), without NaN and +inf, at least one of them finite.
            in_order: whether the logits fall from first to last, for example after another sampler.

        Raises:
            LlamaError: the arguments do not fit this description, or libllama failed.
        """
        ids_at = self._check_ids(ids)
        logits_at = np.array(logits, np.float32)
        if not len(ids_at) or logits_at.shape != ids_at.shape:
            raise LlamaError(
                f"ids of shape {ids_at.shape} and logits of {logits_at.shape}; pass as many of each, at least one"
            )
        if not math.isfinite(top := float(logits_at.max())):
            raise LlamaError(f"the largest logit is {top}; it must be finite, without NaN")
        if in_order and (logits_at[:-1] < logits_at[1:]).any():
            raise LlamaError("in_order=True, but the logits do not fall")
        probabilities = np.zeros(len(ids_at), np.float32)
        in_order_at, selected_at = ffi.new("int8_t *", in_order), ffi.new("int32_t *")
        with self._lock, self._handle.use() as native:
            n = check(
                lib.erl_sampler_apply(
                    native,
                    len(ids_at),
                    ffi.from_buffer("int32_t[]", ids_at, require_writable=True),
                    ffi.from_buffer("float[]", logits_at, require_writable=True),
                    ffi.from_buffer("float[]", probabilities, require_writable=True),
                    in_order_at,
                    selected_at,
                ),
                f"applying the sampler {self.name}",
            )
        return SamplerOutput(
            ids_at[:n], logits_at[:n], probabilities[:n], bool(in_order_at[0]), int(selected_at[0])
        )

    def _check_ids(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        ids = np.array(tokens, np.int64)
        n_vocab = _INT32_MAX if self._n_vocab is None else self._n_vocab
        if ids.ndim != 1:
            raise LlamaError(f"ids of shape {ids.shape}; pass one dimension")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= n_vocab):
            bad = int(ids[(ids < 0) | (ids >= n_vocab)][0])
            raise LlamaError(f"token id {bad} is outside the vocabulary of {n_vocab} tokens")
        return ids.astype(np.int32)


def _names(name: str, n_numbers: int) -> tuple[str, ...]:
    """Return the names of the numeric arguments of a sampler."""
    names = ("n_vocab", *("token", "bias") * (n_numbers // 2)) if name == "logit_bias" else _NUMBERS.get(name)
    if names is None:
        raise LlamaError(f"unknown sampler {name!r}; use logit_bias, {', '.join(_NUMBERS)}")
    if len(names) != n_numbers:
        raise LlamaError(f"{n_numbers} numbers for the sampler {name}; it takes {', '.join(names) or 'no numbers'}")
    return names


def _check_number(name: str, label: str, number: float) -> float:
    if label in _INTEGERS:
        minimum, maximum = _INTEGERS[label]
        if not (minimum <= number <= maximum and number == int(number)):
            raise LlamaError(f"{label}={number!r} of the sampler {name}; pass an integer, {minimum} to {maximum}")
    elif not (abs(number) <= _FLOAT_MAX or (label == "bias" and number == -math.inf)):
        raise LlamaError(f"{label}={number!r} of the sampler {name}; pass a number that float32 holds")
    return float(number)


def _encode_texts(name: str, texts: Sequence[str]) -> list[bytes]:
    minimum, maximum = _TEXTS.get(name, (0, 0))
    if isinstance(texts, str) or not minimum <= len(texts) <= maximum:
        raise LlamaError(f"{len(texts)} texts for the sampler {name}; it takes a list of {minimum} to {maximum}")
    if any("\0" in text for text in texts):
        raise LlamaError(
            f"a text of the sampler {name} has a character U+0000, which would end the text in libllama"
        )
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _free_sampler(model: Handle | None) -> Callable[[object], None]:
    def free(pointer: object) -> None:
        lib.erl_sampler_free(pointer)
        if model is not None:
            model.release()

    return free
