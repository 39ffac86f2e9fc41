"""Rules for backends about long sequences, many sequences and many calls.

Part of `BackendConformance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import SkipTest

import numpy as np

from erllama.testing.backends.model import BackendModel, PackedRange
from erllama.testing.backends.rules import BackendRules, decode_slice
from erllama.testing.rules import require

_EDGES = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 41, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300, 511, 512, 513)


class LongRules(BackendRules):
    """Rules about long sequences, many sequences and many calls."""

    # --- positions ----------------------------------------------------------------------------------

    def test_a_long_prompt_may_be_split_anywhere(self) -> None:
        """However a long prompt is split, each output row has the logits of the tokens up to it."""
        with self._model() as model:
            ids = self._long(model)
            for step in (model.max_slice, 7, max(model.max_slice - 1, 1)):
                model.clear()
                for start in range(0, len(ids), step):
                    model.decode([(0, ids[start : start + step])], extra_output=start % 3 == 0)
            model.clear()
            for start, end in pairwise([0, *_edges(len(ids))]):
                for at in range(start, end, model.max_slice):
                    model.decode([(0, ids[at : min(at + model.max_slice, end)])])

    def test_every_token_of_a_long_prompt_matters(self) -> None:
        """Where memory can be cut, logits depend on each token before them, however far back."""
        with self._model(trim=True) as model:
            ids = self._long(model)
            backend, token_ids = model.backend, self.token_ids
            for at in range(len(ids) - 1):
                found = []
                for token in token_ids[:2]:
                    found.append(
                        decode_slice(backend, 0, at, np.array([token, ids[at + 1]], np.int32), output=(0, 1))
                    )
                    backend.cut(0, at)
                one, other = found
                require(not np.array_equal(one[0], other[0]), f"decode(): the token at position {at} has no effect")
                require(
                    not np.array_equal(one[1], other[1]),
                    f"decode(): the token at position {at} has no effect on the next row",
                )
                decode_slice(backend, 0, at, np.array([ids[at]], np.int32))
            plain = model.expected(ids).copy()
            for at in [0, *(end for end in _edges(len(ids) - 1) if end in (1, 16, 41, 128, 256, 512))]:
                changed = list(ids)
                changed[at] = self._other(ids[at])
                require(
                    not np.array_equal(plain, model.expected(changed)),
                    f"decode(): token {at} of {len(ids)} has no effect on the last row",
                )

    # --- sharing ------------------------------------------------------------------------------------

    def test_any_length_can_be_shared(self) -> None:
        """A target holds exactly the first `end` positions of its source, for each `end`, source and target."""
        with self._model(trim=True, sequences=2) as model:
            ids, n = self._long(model), model.limits.n_sequences
            model.prefill(0, ids)
            for i, end in enumerate([*_edges(len(ids)), len(ids)]):
                target = 1 + i % (n - 1)
                model.share(0, target, end)
                model.probe(target, ids[end % len(ids)])
                model.probe(target, self._other(ids[end % len(ids)]))
                again = 1 + (i + 1) % (n - 1)
                if again != target:  # share a sequence that is shared itself
                    model.share(target, again, max(end - 1, 0))
                    model.probe(again, ids[end - 1])
                    model.drop(again)
                model.drop(target)
            model.share(0, n - 1, 0)
            model.decode([(n - 1, ids[:2])])
            model.drop(n - 1)
            # In the other direction: from the last sequence into the first.
            model.share(0, n - 1, len(ids))
            model.drop(0)
            for end in _edges(len(ids))[-4:]:
                model.share(n - 1, 0, end)
                model.probe(0, ids[0])
                model.drop(0)
            model.probe(n - 1, ids[0])

    def test_sharers_are_independent(self) -> None:
        """After `share`, what one sequence computes, cuts or drops does not change the others."""
        with self._model(trim=True, sequences=3) as model:
            ids = self._long(model)[: model.limits.n_ctx // 3]
            n = min(model.limits.n_sequences, 6)
            model.prefill(0, ids)
            for target in range(1, n):
                model.share(0, target, len(ids) - target)
            for turn in range(4):
                model.decode([(s, [self._other(ids[s + turn])]) for s in range(n)], interleaved=turn % 2 == 0)
            for sequence in (1, 0, 2):
                model.cut(sequence, len(ids) // 2)
                model.decode([(sequence, self._ids(5, seed=9 + sequence).tolist())])
                for other in range(n):
                    model.probe(other, ids[0])
            for sequence in range(n - 1):
                model.drop(sequence)
                for other in range(sequence + 1, n):
                    model.probe(other, ids[1])

    # --- pack, restore and cut ----------------------------------------------------------------------

    def test_long_sequences_restore_at_each_length(self) -> None:
        """Packed whole or in ranges, each position restores unchanged, into any sequence and any instance."""
        with self._model() as model, self._model() as second:
            ids, last = self._long(model), model.limits.n_sequences - 1
            ends = [*_edges(len(ids) - 1), len(ids) - 1]
            pieces = self._packed_in_pieces(model, ids, ends)
            if model.limits.whole_state:
                pieces = pieces[-1:]
            whole = model.pack(0, 0, ends[-1])
            for other, sequence in ((model, 0), (second, last), (model, last), (second, 0)):
                for packed in ([whole], pieces):
                    other.clear()
                    for piece in packed:
                        other.restore(sequence, piece)
                    other.decode([(sequence, ids[-1:])])
                    if not model.limits.can_trim:
                        continue
                    for end in reversed(ends):
                        other.cut(sequence, end)
                        other.decode([(sequence, [ids[end]])])

    def _packed_in_pieces(self, model: BackendModel, ids: list[int], ends: list[int]) -> list[PackedRange]:
        """Decode `ids`, and pack each range when its end is reached."""
        pieces = []
        for start, end in pairwise([0, *ends]):
            for at in range(start, end, model.max_slice):
                model.decode([(0, ids[at : min(at + model.max_slice, end)])])
            pieces.append(model.pack(0, start, end))
        return pieces

    def test_a_long_sequence_can_be_cut_anywhere(self) -> None:
        """After a cut at any position, a sequence holds the tokens before it and continues with other tokens."""
        with self._model(trim=True) as model:
            ids = self._long(model)
            for i, end in enumerate(reversed(_edges(len(ids) - 4))):
                n_held = len(model.tokens[0])
                if n_held < end + 4:
                    model.prefill(0, ids[n_held : end + 4] if n_held <= end else [])
                    model.cut(0, 0)
                    model.prefill(0, ids[: end + 4])
                model.cut(0, end)
                model.decode([(0, [ids[end]])])
                model.cut(0, end)
                if i % 5 == 0:
                    model.decode([(0, self._ids(3, seed=50 + i).tolist())])
                    model.cut(0, end)

    def test_dropped_tokens_leave_no_trace(self) -> None:
        """After `cut`, `drop` or `clear`, `pack` and `share` of the same positions use the new tokens."""
        with self._model(trim=True, sequences=2) as model, self._model(trim=True) as second:
            n = min(len(self._long(model)) // 3, 96)
            old, new, last = (
                self._ids(n, seed=20).tolist(),
                self._ids(n, seed=21).tolist(),
                model.limits.n_sequences - 1,
            )
            model.prefill(0, new)
            payload_of_new = model.pack(0, 0, n)
            model.clear()

            def shared_from_another() -> None:
                model.prefill(last, new)
                model.drop(0)
                model.share(last, 0, n)
                model.drop(last)

            def computed_after_a_part() -> None:
                model.cut(0, n // 2)
                model.prefill(0, new[n // 2 :])

            def restored() -> None:
                model.drop(0)
                model.restore(0, payload_of_new)

            def computed_after(change: Callable[[], None]) -> Callable[[], None]:
                def computed() -> None:
                    change()
                    model.prefill(0, new)

                return computed

            changes = [
                computed_after(lambda: model.cut(0, 0)),
                computed_after(lambda: model.drop(0)),
                computed_after(model.clear),
                computed_after_a_part,
                shared_from_another,
                restored,
            ]
            for change in changes:
                model.clear()
                model.prefill(0, old)
                for start, end in ((0, n), (n // 4, n // 2), (n - 8, n)):
                    model.pack(0, start, end)
                model.share(0, last, n)
                model.drop(last)
                change()
                self._check_copies(model, second, n)

    def _check_copies(self, model: BackendModel, second: BackendModel, n: int) -> None:
        """Check that sequence 0, restored into `second` and shared with another sequence, has its own tokens."""
        last = model.limits.n_sequences - 1
        cuts = [0, n // 4, n // 2, n - 8, n]
        for ranges in ([(0, n)], list(pairwise(cuts))):
            second.clear()
            for start, end in ranges:
                second.restore(0, model.pack(0, start, end))
                second.probe(0, self.token_ids[0])
        model.share(0, last, n)
        model.probe(last, self.token_ids[0])
        model.probe(0, self.token_ids[1])

    # --- many sequences, many calls -----------------------------------------------------------------

    def test_all_sequences_generate_together(self) -> None:
        """Sequences from the first to the last number, each with its own prompt, decode in shared batches."""
        with self._model(sequences=2) as model:
            limits = model.limits
            n = min(limits.n_sequences, limits.n_batch // 2, limits.n_ctx // 20, 16)
            if n < 2:
                raise SkipTest("a rule for two sequences and more")
            # Include the last sequence number.
            numbers = [*range(n - 1), limits.n_sequences - 1]
            room = limits.n_ctx // n - 12
            for i, sequence in enumerate(numbers):
                model.prefill(sequence, self._ids(min(5 + 3 * i, room), seed=30 + i).tolist())
            for turn in range(8):
                order = numbers if turn % 2 else numbers[::-1]
                model.decode([(s, [int(self._ids(1, seed=100 * turn + s)[0])]) for s in order])
            model.decode([(s, self._ids(2, seed=s).tolist()) for s in numbers], extra_output=True)
            model.decode(
                [(s, self._ids(1 + (s == numbers[1]), seed=s).tolist()) for s in numbers],
                interleaved=False,
                extra_output=True,
            )
            for i, sequence in enumerate(numbers[::2]):
                model.drop(sequence)
                model.prefill(sequence, self._ids(4 + i, seed=60 + i).tolist())
                model.decode([(s, self._ids(1, seed=70 + i).tolist()) for s in numbers])

    def test_equal_prompts_stay_separate(self) -> None:
        """Sequences with equal tokens are separate: one may continue, be cut or be dropped without the others."""
        with self._model(sequences=2) as model:
            ids = self._ids(min(40, model.limits.n_ctx // 4 - 4)).tolist()
            for sequence in (0, 1):
                model.prefill(sequence, ids)
            model.decode([(0, self._ids(2, seed=1).tolist()), (1, self._ids(2, seed=2).tolist())])
            packed = model.pack(1, 0, len(model.tokens[1]))
            model.drop(0)
            model.restore(0, packed)
            model.decode([(0, self._ids(1, seed=3).tolist()), (1, self._ids(1, seed=3).tolist())])
            model.drop(1)
            model.decode([(0, self._ids(1, seed=4).tolist())])

    def test_random_calls_agree_with_a_model(self) -> None:
        """Each of many random calls does what the reference model predicts."""
        random = np.random.Generator(np.random.PCG64(7))
        with self._model() as model:
            packed: list[PackedRange] = []
            for turn in range(self.n_calls):
                random_call(model, random, packed, list(self.token_ids))
                if turn % 60 == 59:
                    model.clear()

    # --- helpers ----------------------------------------------------------------------------------------

    @contextmanager
    def _model(self, *, sequences: int = 1, trim: bool = False) -> Iterator[BackendModel]:
        with self._backend(sequences=sequences, trim=trim) as backend, self._backend() as cold:
            yield BackendModel(backend, cold, self.tolerance)

    def _long(self, model: BackendModel) -> list[int]:
        """Return a long prompt that leaves room for a few tokens."""
        found: list[int] = self._ids(min(self.n_tokens, model.limits.n_ctx - 8), seed=5).tolist()
        return found

    def _other(self, token: int) -> int:
        return next(other for other in self.token_ids if other != token)


def random_call(
    model: BackendModel, random: np.random.Generator, packed: list[PackedRange], token_ids: list[int]
) -> None:
    """Make one call that is allowed now, chosen by `random`. Add packed ranges to `packed`."""
    limits, tokens = model.limits, model.tokens
    n = min(limits.n_sequences, 4)
    numbers = [0, *range(limits.n_sequences - n + 1, limits.n_sequences)]  # the first number and the last ones
    sequence = numbers[random.integers(len(numbers))]
    n_held = len(tokens[sequence])
    kind = random.integers(10)
    if kind < 4:
        _random_decode(model, random, numbers, token_ids)
    elif kind == 4 and n_held:
        start = 0 if not limits.can_trim else int(random.integers(n_held))
        end = n_held if not limits.can_trim else int(random.integers(start + 1, n_held + 1))
        packed.append(model.pack(sequence, start, end))
        del packed[:-12]
    elif kind == 5:
        fits = [
            p
            for p in packed
            if tuple(tokens[sequence]) == p.tokens[: p.start] or (limits.whole_state and not n_held)
        ]
        if fits:
            model.restore(sequence, fits[random.integers(len(fits))])
        else:
            model.drop(sequence)
    elif kind == 6 and limits.can_trim and n_held:
        empty = [number for number in numbers if not tokens[number]]
        if empty:
            model.share(sequence, empty[0], int(random.integers(n_held + 1)))
    elif kind == 7 and limits.can_trim:
        model.cut(sequence, int(random.integers(n_held + 1)))
    elif kind == 8 and limits.can_trim:
        model.probe(sequence, token_ids[random.integers(len(token_ids))])
    elif kind == 9:
        model.drop(sequence)


def _random_decode(
    model: BackendModel, random: np.random.Generator, numbers: list[int], token_ids: list[int]
) -> None:
    chosen = [number for number in numbers if random.integers(2)] or numbers[:1]
    max_tokens = max(model.max_slice // len(chosen), 1)
    parts = []
    for sequence in chosen[: model.limits.n_batch]:
        length = int(random.integers(1, min(max_tokens, (1, 4, 40)[random.integers(3)]) + 1))
        parts.append((sequence, [token_ids[i] for i in random.integers(0, len(token_ids), length)]))
    total = sum(len(ids) for _, ids in parts)
    if not model.limits.can_trim and sum(map(len, model.tokens)) + total > model.limits.n_ctx:
        model.clear()
        return
    if not model.decode(parts, interleaved=bool(random.integers(2)), extra_output=bool(random.integers(2))):
        model.drop(max(numbers, key=lambda number: len(model.tokens[number])))


def _edges(n: int) -> list[int]:
    """Return the lengths up to `n` around which faults are likely: multiples of block and buffer sizes."""
    return [edge for edge in _EDGES if edge <= n]
