"""The declaration of a sampler step: its name, its options, their defaults and ranges.

A step is declared once, by its class. `erllama.engine.sampling.options` derives the fields and the checks of
`SamplingOptions` from the classes, `erllama.engine.sampling.sampler` builds the chain from them, and a test
compares the table in `docs/sampling.md` and the signature of `Model.complete` with them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, Generic, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from erllama.checks import integer, real
from erllama.engine.backend import Vocabulary
from erllama.engine.sampling.candidates import Candidates

Step = Callable[[Candidates], Candidates]
T = TypeVar("T")
# Values that one model's steps share, such as the breakers of DRY. One takes some hundred kB.
_MAX_SHARED = 8


class Option(Generic[T]):
    """An option of a sampler step, declared as a class attribute. The attribute's name is the option's name.

    Args:
        default: the value if the caller passes none.
        minimum, maximum: the range of a number, both ends included; None is without limit.
        neutral: another value that asks for no step; None if only the default does.
        check: returns the checked value of an option that is not a number, or raises OptionError.
        shared: whether several steps have the option. It is then valid even if one of them is left out.
    """

    def __init__(
        self,
        default: T,
        minimum: float | None = None,
        maximum: float | None = None,
        *,
        neutral: T | None = None,
        check: Callable[[object], T] | None = None,
        shared: bool = False,
    ) -> None:
        self.name = ""
        self.default, self.minimum, self.maximum, self.neutral = default, minimum, maximum, neutral
        self.shared = shared
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def of(self, options: object) -> T:
        """Return the option's value in `SamplingOptions`."""
        return cast(T, getattr(options, self.name))

    def checked(self, value: object) -> T:
        """Return the value as the option's type.

        Raises:
            OptionError: the value has another type, or is out of range.
        """
        if self._check is not None:
            return self._check(value)
        check: Callable[..., object] = integer if isinstance(self.default, int) else real
        return cast(T, check(self.name, value, self.minimum, self.maximum))

    def is_neutral(self, options: object) -> bool:
        """Return whether the value asks for no step: the default, or `neutral`."""
        return self.of(options) in (self.default, self.neutral)


class HasOptions:
    """A class whose options are class attributes."""

    @classmethod
    def declared_options(cls) -> tuple[Option[object], ...]:
        """Return the options, in the order of their declaration."""
        return tuple(value for value in vars(cls).values() if isinstance(value, Option))


class StepContext:
    """The model for which a step is built. Thread-safe.

    Attributes:
        vocabulary: the model's vocabulary.
        n_ctx: tokens of its context.
    """

    def __init__(self, vocabulary: Vocabulary, n_ctx: int) -> None:
        self.vocabulary, self.n_ctx = vocabulary, n_ctx
        self._shared: dict[Hashable, object] = {}
        self._lock = threading.Lock()

    def last_n(self, n: int) -> int:
        """Return the number of last tokens that an option asks for: -1 asks for the whole context."""
        return self.n_ctx if n < 0 else n

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return a value that the steps of several requests share. The least recently used one is dropped first."""
        with self._lock:
            value = self._shared.pop(key) if key in self._shared else make()
            self._shared[key] = value
            if len(self._shared) > _MAX_SHARED:
                del self._shared[next(iter(self._shared))]
            return cast(T, value)


class ChainStep(HasOptions):
    """A step that `samplers` can name. It takes candidates and returns those that remain, or changes their logits.

    Attributes:
        name: the name in `samplers`.
        summary: what the step does, for the table in the documentation.
        drops_candidates: mirostat replaces the step.
        keeps_best: the step never drops the most likely candidate and never changes which one it is, so that
            temperature=0 needs no such step.
        reads_context: whether the step reads `Candidates.context`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    drops_candidates: ClassVar[bool] = False
    keeps_best: ClassVar[bool] = False
    reads_context: ClassVar[bool] = False

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        """Return the step that `SamplingOptions` ask for; None if the step would change nothing."""
        raise NotImplementedError


class WholeRowsStep(ABC):
    """A step with a second form, for the rows of many requests at once: it changes logits of the whole vocabulary.

    Both forms compute the same bits. The sampler uses the second one if only steps of this kind precede.
    """

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Candidates:
        """Return the candidates of one request with changed logits."""

    @classmethod
    @abstractmethod
    def change_rows(
        cls, steps: Sequence[Self], logits: NDArray[np.float32], contexts: Sequence[NDArray[np.int32]]
    ) -> None:
        """Change the logits of each row in place.

        Args:
            steps: the step of each row: each has the options of its request.
            logits: shape (n, n_vocab).
            contexts: for each row, prompt and reply so far, int32.
        """


class OrderedRowsStep(ABC):
    """A step with a second form, for the rows of many requests at once: it changes the logits that `top_k` left.

    Both forms compute the same bits. The sampler uses the second one after `top_k`, if all steps after it have one.
    """

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Candidates:
        """Return the candidates of one request that remain, or change their logits."""

    @classmethod
    @abstractmethod
    def change_ordered_rows(cls, steps: Sequence[Self], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return new logits in falling order, with -inf for each candidate that the step drops.

        Args:
            steps: the step of each row: each has the options of its request.
            logits: shape (n, k), falling, the first of each row finite; -inf where a row has fewer candidates.
        """


class ListStep(ABC):
    """A step with another form, for a few candidates of one request, in a list of Python's numbers.

    Both forms compute the same bits. Each function of numpy takes some 10 us while the processor's caches are cold,
    as after a decode. The sampler uses this form after `top_k`, if all steps after it have one.
    """

    @abstractmethod
    def change_list(self, logits: list[float]) -> list[float]:
        """Return the logits of the first candidates, changed and in falling order; the step drops the others.

        Args:
            logits: numbers of float32, falling, within `LARGE`.

        Returns:
            at least one such number. An empty list if a number is not within `LARGE`: the sampler then uses the
            other form.
        """
