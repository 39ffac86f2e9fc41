"""Rules for backends: what a backend must do, one test method per rule.

The docstrings of the methods state the rules. `BackendMachine` checks them, and then searches for a sequence of
calls after which the backend returns wrong results.

To run the rules on your own backend, under pytest:

    class TestMine(BackendConformance):
        def make_backend(self):
            return MyBackend("model.gguf", n_ctx=256, n_sequences=4)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from unittest import SkipTest

import numpy as np

from erllama.engine.backend import Batch, LargestLogits, RowSelector
from erllama.errors import BackendError, CellsExhausted
from erllama.testing.backends.embedder_rules import EmbedderRules
from erllama.testing.backends.long_rules import LongRules
from erllama.testing.backends.memory_rules import MemoryRules
from erllama.testing.backends.rules import (
    BatchPart,
    decode,
    decode_slice,
    raises,
    require_same_bits,
    run_in_thread,
)
from erllama.testing.rules import frequent_thread_switches, require


class BackendConformance(MemoryRules, LongRules, EmbedderRules):
    """Tests of every rule for backends. Derive a class Test… from it, define `make_backend`, and run pytest.

    Create the backend with a few hundred cells, because the rules fill all of them, and with at least three
    sequences. Rules that need more sequences, or another kind of memory, are skipped. pytest is not required: a
    rule that holds returns, one that does not apply raises `unittest.SkipTest`, and a broken one raises
    AssertionError.

    The attributes are those of `BackendRules`.
    """

    # --- attributes --------------------------------------------------------------------------------

    def test_limits_are_consistent(self) -> None:
        """Sizes are at least 1, a micro-batch is at most a batch, and memory is of one kind."""
        with self._backend() as backend:
            limits = backend.limits
            sizes = (limits.n_ctx, limits.n_batch, limits.n_ubatch, limits.n_vocab, limits.n_sequences)
            require(min(sizes) >= 1, f"a size below 1: {limits}")
            require(limits.n_ubatch <= limits.n_batch, f"n_ubatch is more than n_batch: {limits}")
            require(limits.attention_window >= 0, f"a negative window: {limits}")
            plain = not limits.whole_state and limits.attention_window == 0
            require(plain or not limits.can_trim, f"can_trim excludes a window and whole_state: {limits}")

    def test_the_namespace_is_constant(self) -> None:
        """`namespace` maps names to str, int, float, bool or None, and is the same for each instance."""
        with self._backend() as one, self._backend() as other:
            before = dict(one.namespace)
            require(before, "the namespace is empty: any two models would share their KV")
            for name, value in before.items():
                require(isinstance(name, str), f"a name in the namespace is not a str: {name!r}")
                require(
                    value is None or isinstance(value, str | int | float | bool),
                    f"namespace[{name!r}] is {value!r}; it must be a str, int, float, bool or None",
                )
            require(before == dict(other.namespace), "two instances have different namespaces")
            decode_slice(one, 0, 0, self._ids(4))
            require(before == dict(one.namespace), "the namespace changed with use")

    def test_recipe_and_limits_are_constant(self) -> None:
        """`recipe` is 16 bytes, equal for all instances that compute alike. It and `limits` never change."""
        with self._backend() as one, self._backend() as other:
            require(isinstance(one.recipe, bytes) and len(one.recipe) == 16, f"the recipe is {one.recipe!r}")
            require(one.recipe == other.recipe, "two instances have different recipes")
            before, limits = one.recipe, one.limits
            decode_slice(one, 0, 0, self._ids(4))
            decode_slice(one, 0, 4, self._ids(1))
            require(one.recipe == before, "the recipe changed with use")
            require(one.limits == limits, f"limits changed with use: {limits}, then {one.limits}")
            require(one.limits == other.limits, "two instances have different limits")

    # --- the vocabulary -----------------------------------------------------------------------------

    def test_detokenize_restores_the_text(self) -> None:
        """`tokenize` returns int32 ids of the vocabulary, shape (n,). `detokenize` returns the text's bytes."""
        with self._backend() as backend:
            vocabulary = backend.vocabulary
            for text in self.texts:
                for source in (text, text.encode()):
                    ids = vocabulary.tokenize(source, add_special=False)
                    require(ids.dtype == np.int32 and ids.ndim == 1, f"ids are {ids.dtype}, shape {ids.shape}")
                    require(
                        bool(np.all((ids >= 0) & (ids < vocabulary.n_tokens))), f"ids outside the vocabulary: {ids}"
                    )
                    for source_ids in (ids, ids.tolist()):
                        found = vocabulary.detokenize(source_ids)
                        require(found == text.encode(), f"{text!r} is detokenized to {found!r}")

    def test_pieces_join_to_the_text(self) -> None:
        """The pieces of a text's tokens join to its bytes. Some vocabularies add a leading space."""
        with self._backend() as backend:
            for text in self.texts:
                ids = backend.vocabulary.tokenize(text, add_special=False)
                pieces = b"".join(backend.vocabulary.piece(int(token)) for token in ids)
                require(pieces in (text.encode(), b" " + text.encode()), f"the pieces of {text!r} are {pieces!r}")

    def test_every_token_has_a_piece_and_a_flag(self) -> None:
        """`piece` returns bytes for every token, `is_eog` is a bool for each, and every logit has a token."""
        with self._backend() as backend:
            vocabulary = backend.vocabulary
            require(vocabulary.n_tokens >= backend.limits.n_vocab, "there are more logits than tokens")
            ends = vocabulary.is_eog
            require(ends.dtype == np.bool_, f"is_eog is {ends.dtype}")
            require(ends.shape == (vocabulary.n_tokens,), f"is_eog has shape {ends.shape}")
            require(not ends[list(self.token_ids)].any(), "token_ids contains a token that ends generation")
            for token in range(vocabulary.n_tokens):
                piece = vocabulary.piece(token)
                require(isinstance(piece, bytes), f"the piece of token {token} is {piece!r}")

    def test_any_thread_may_use_the_vocabulary(self) -> None:
        """Threads that tokenize at the same time, also during a decode, get the results of one thread alone."""
        texts = [*self.texts, *(f"thread {i} " * i for i in range(1, 9))]

        def text_to_text(first: int) -> None:
            for turn in range(20 * len(texts)):
                text = texts[(first + turn) % len(texts)]
                found = backend.vocabulary.detokenize(backend.vocabulary.tokenize(text, add_special=False))
                require(found == text.encode(), f"with several threads, {text!r} is detokenized to {found!r}")

        with self._backend() as backend, frequent_thread_switches(), ThreadPoolExecutor(4) as pool:
            found = [pool.submit(text_to_text, 3 * i) for i in range(4)]
            decode_slice(backend, 0, 0, self._ids(8))
            for each in found:
                each.result()

    # --- decode -------------------------------------------------------------------------------------

    def test_logits_are_in_batch_order(self) -> None:
        """`decode` returns finite float32 logits, shape (rows with output, n_vocab), in the order of the batch."""
        ids, chosen = self._ids(6), [1, 4, 5]
        with self._backend() as backend:
            every = decode_slice(backend, 0, 0, ids, output=range(6))
            require(every.dtype == np.float32, f"logits are {every.dtype}")
            require(every.shape == (6, backend.limits.n_vocab), f"logits of 6 rows have shape {every.shape}")
            require(bool(np.isfinite(every).all()), "logits are not finite")
            backend.clear()
            some = decode_slice(backend, 0, 0, ids, output=chosen)
            require(some.shape == (3, backend.limits.n_vocab), f"logits of 3 of 6 rows have shape {some.shape}")
            self._require_close(some, every[chosen], "rows 1, 4 and 5 of a batch")

    def test_rows_without_output_return_no_logits(self) -> None:
        """A batch without output rows returns shape (0, n_vocab). Its tokens still affect later logits."""
        ids = self._ids(7)
        with self._backend() as backend:
            no_logits = decode_slice(backend, 0, 0, ids[:4], output=())
            require(
                no_logits.shape == (0, backend.limits.n_vocab), f"logits of no row have shape {no_logits.shape}"
            )
            continued = decode_slice(backend, 0, 4, ids[4:])
            backend.clear()
            decode_slice(backend, 0, 0, ids[:4])
            self._require_close(
                continued, decode_slice(backend, 0, 4, ids[4:]), "a prompt whose first half had no output rows"
            )

    def test_every_token_affects_the_logits(self) -> None:
        """Logits depend on each token before them. Otherwise no fault of the memory would show."""
        ids = self._ids(8)
        with self._backend() as backend:
            plain = decode_slice(backend, 0, 0, ids)
            for at in range(len(ids)):
                backend.clear()
                other = ids.copy()
                other[at] = next(token for token in self.token_ids if token != ids[at])
                require(
                    not np.array_equal(plain, decode_slice(backend, 0, 0, other)),
                    f"token {at} of {len(ids)} has no effect",
                )

    def test_equal_batches_return_equal_bits(self) -> None:
        """Equal batches on empty memory return equal bits: after `clear`, and in another instance."""
        ids = self._ids(9)
        with self._backend() as backend, self._backend() as other:
            first = [decode_slice(backend, 0, 0, ids[:6]), decode_slice(backend, 0, 6, ids[6:])]
            backend.clear()
            for again in (backend, other):
                require_same_bits(decode_slice(again, 0, 0, ids[:6]), first[0], "the same batch, again")
                require_same_bits(decode_slice(again, 0, 6, ids[6:]), first[1], "the same second batch, again")

    def test_the_largest_logits_are_those_of_numpy(self) -> None:
        """`argmax` and `top_k`, if there are any, return what a stable sort of the logits returns."""
        with self._backend() as backend:
            if not isinstance(backend, RowSelector):
                raise SkipTest("a rule for backends that select logits")
            flags, positions = np.ones(6, np.int8), np.arange(6, dtype=np.int32)
            logits = backend.decode(Batch(self._ids(6), positions, np.zeros(6, np.int32), flags))
            changed = logits.round()  # equal ones
            changed[1, 1::2] = changed[2] = -np.inf
            for rows in (logits, logits[:1], logits[2:5], changed):
                order = np.argsort(-rows, axis=1, kind="stable")
                expected = [
                    int(ids[0]) if row[ids[0]] > -np.inf else -1 for row, ids in zip(rows, order, strict=True)
                ]
                found = backend.argmax(rows)
                require(found == expected, f"the largest logits of rows are at {found}, not {expected}")
                for k in {1, 2, 40, rows.shape[1]}:
                    k = min(k, rows.shape[1])
                    ids, largest = out = _empty_results(len(rows), k)
                    backend.top_k(rows, out)
                    require(np.array_equal(ids, order[:, :k]), f"the {k} largest logits of a row have other ids")
                    sorted_rows = np.take_along_axis(rows, order[:, :k], 1)
                    require(np.array_equal(largest, sorted_rows), f"the {k} largest logits of a row differ")
            changed[0, -1], changed[1, 2], changed[1, -1] = np.nan, np.inf, np.nan
            changed[3, 2] = np.inf
            require(backend.argmax(changed)[:4] == [-1] * 4, "argmax chose a token of a row with NaN or infinity")
            out = _empty_results(len(changed), 2)
            backend.top_k(changed, out)
            first = out.logits[[0, 1, 3], 0].tolist()
            require(str(first) == "[nan, nan, inf]", f"rows with NaN or infinity have the largest logits {first}")

    def test_a_prompt_may_be_split(self) -> None:
        """In one batch, in two, or token by token, the logits are the same, to `tolerance`."""
        ids = self._ids(12)
        with self._backend() as backend:
            whole = decode_slice(backend, 0, 0, ids, output=range(12))
            for cuts in ([0, 5, 12], list(range(13))):
                backend.clear()
                parts = [
                    decode_slice(backend, 0, start, ids[start:end], output=range(end - start))
                    for start, end in pairwise(cuts)
                ]
                self._require_close(np.concatenate(parts), whole, f"a prompt cut at {cuts}")

    def test_sequences_are_independent(self) -> None:
        """The logits of a sequence are, to `tolerance`, the same alone and beside other sequences."""
        with self._backend(sequences=3) as backend:
            prompts = [self._ids(8, seed=i) for i in range(3)]
            alone = [self._logits_alone(backend, ids, [5, 8]) for ids in prompts]
            for i, ids in enumerate(prompts):
                decode_slice(backend, i, 0, ids[:5])
            for i in (2, 0, 1):
                self._require_close(
                    decode_slice(backend, i, 5, prompts[i][5:]), alone[i], f"sequence {i} among three"
                )

    def test_rows_of_sequences_may_be_interleaved(self) -> None:
        """A batch may hold rows of several sequences, in any order between them. Each has its logits alone."""
        with self._backend(sequences=3) as backend:
            prompts = [self._ids(n, seed=n) for n in (9, 6, 8)]
            alone = [self._logits_alone(backend, ids, [4, len(ids)]) for ids in prompts]
            for interleaved in (False, True):
                backend.clear()
                decode(
                    backend, [BatchPart(i, 0, ids[:4]) for i, ids in enumerate(prompts)], interleaved=interleaved
                )
                found = decode(
                    backend, [BatchPart(i, 4, ids[4:]) for i, ids in enumerate(prompts)], interleaved=interleaved
                )
                for i, logits in enumerate(found):
                    self._require_close(logits, alone[i], f"sequence {i} of an interleaved batch")

    def test_prefill_and_decode_may_share_a_batch(self) -> None:
        """A batch may hold a slice of one sequence's prompt and the last tokens of other sequences."""
        with self._backend(sequences=3) as backend:
            prompts = [self._ids(n, seed=n) for n in (7, 5, 10)]
            alone = [self._logits_alone(backend, ids, [len(ids) - 1, len(ids)]) for ids in prompts[:2]]
            alone.append(self._logits_alone(backend, prompts[2], [10]))
            for i in (0, 1):
                decode_slice(backend, i, 0, prompts[i][:-1])
            parts = [BatchPart(i, len(prompts[i]) - 1, prompts[i][-1:]) for i in (0, 1)] + [
                BatchPart(2, 0, prompts[2])
            ]
            for i, logits in enumerate(decode(backend, parts)):
                self._require_close(logits, alone[i], f"sequence {i} beside others")

    # --- refused batches ----------------------------------------------------------------------------

    def test_a_batch_above_n_batch_is_refused(self) -> None:
        """A batch of more than `n_batch` rows raises BackendError. After `clear`, logits are right again."""
        with self._backend() as backend:
            before = decode_slice(backend, 0, 0, self._ids(5))
            backend.clear()
            with raises(BackendError, "a batch of n_batch + 1 tokens"):
                decode_slice(backend, 0, 0, self._ids(backend.limits.n_batch + 1))
            backend.clear()
            require_same_bits(
                decode_slice(backend, 0, 0, self._ids(5)), before, "a sequence after a batch that was too large"
            )

    def test_positions_must_be_consecutive(self) -> None:
        """Positions that leave a gap or go back raise BackendError. After `clear`, logits are right again."""
        self._refuses_positions(([6, 7], [3, 4], [5, 7], [6, 5]))

    def test_positions_must_not_repeat(self) -> None:
        """A position that occurs twice in a batch raises BackendError. After `clear`, logits are right again."""
        self._refuses_positions(([5, 5],))

    def _refuses_positions(self, wrong: Sequence[Sequence[int]]) -> None:
        if not self.checks_positions:
            raise SkipTest("checks_positions is False")
        ids, sequences, output = self._ids(7), np.zeros(2, np.int32), np.array([0, 1], np.int8)
        with self._backend() as backend:
            expected = self._logits_alone(backend, ids, [5, 7])
            for positions in wrong:
                decode_slice(backend, 0, 0, ids[:5])
                with raises(BackendError, f"positions {positions} after 5 held positions"):
                    backend.decode(Batch(ids[5:], np.array(positions, np.int32), sequences, output))
                require_same_bits(
                    self._logits_alone(backend, ids, [5, 7]), expected, "a sequence after wrong positions"
                )

    def test_a_batch_without_room_changes_nothing(self) -> None:
        """With too few free cells, `decode` raises CellsExhausted and changes no sequence. Smaller batches work."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx, ids, last = backend.limits.n_ctx, self._ids(backend.limits.n_ctx), backend.limits.n_sequences - 1
            expected = self._fill(backend, 0, ids)
            backend.clear()
            self._fill(backend, 0, ids[:-3])
            before = backend.pack(0, 0, n_ctx - 3)
            with raises(CellsExhausted, "4 tokens for 3 cells"):
                decode_slice(backend, last, 0, ids[:4])
            require(np.array_equal(before, backend.pack(0, 0, n_ctx - 3)), "a refused batch changed the sequence")
            self._require_close(
                decode_slice(backend, 0, n_ctx - 3, ids[-3:]), expected, "a sequence after a batch that did not fit"
            )

    def test_an_interleaved_batch_without_room_changes_nothing(self) -> None:
        """Where a batch of several sequences raises CellsExhausted, none of the sequences has changed."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx, ids, other = backend.limits.n_ctx, self._ids(backend.limits.n_ctx), self._ids(8, seed=1)
            expected = self._logits_alone(backend, other[:4], [2, 4])
            decode_slice(backend, 1, 0, other[:2])
            self._fill(backend, 0, ids[:-6])  # 4 cells are free
            with raises(CellsExhausted, "5 tokens for 4 cells"):
                decode(backend, [BatchPart(0, n_ctx - 6, ids[:2]), BatchPart(1, 2, other[2:5])])
            logits = decode(backend, [BatchPart(0, n_ctx - 6, ids[:2]), BatchPart(1, 2, other[2:4])])
            self._require_close(logits[1], expected, "a sequence after a refused batch")

    def test_a_sequence_holds_at_most_n_ctx_tokens(self) -> None:
        """Positions from `n_ctx` on raise CellsExhausted, and the sequence does not change."""
        with self._backend(trim=True) as backend:
            n_ctx, ids = backend.limits.n_ctx, self._ids(backend.limits.n_ctx)
            expected = self._fill(backend, 0, ids)
            with raises(CellsExhausted, "a token after the last cell"):
                decode_slice(backend, 0, n_ctx, ids[:1])
            backend.clear()
            self._fill(backend, 0, ids[:-3])
            with raises(CellsExhausted, "4 tokens for 3 cells"):
                decode_slice(backend, 0, n_ctx - 3, ids[:4])
            self._require_close(
                decode_slice(backend, 0, n_ctx - 3, ids[-3:]), expected, "a sequence after a batch that did not fit"
            )

    # --- aborting and closing ---------------------------------------------------------------------

    def test_abort_stops_decodes_until_it_is_reset(self) -> None:
        """After `abort(True)` in another thread, decodes raise BackendError, until `abort(False)`."""
        ids = self._ids(8)
        with self._backend() as backend:
            expected = self._logits_alone(backend, ids, [8])
            run_in_thread(lambda: backend.abort(True))
            for _ in range(2):
                with raises(BackendError, "an aborted decode"):
                    decode_slice(backend, 0, 0, ids)
            run_in_thread(lambda: backend.abort(False))
            backend.clear()
            require_same_bits(decode_slice(backend, 0, 0, ids), expected, "a decode after an abort")

    def test_abort_stops_nothing_but_decodes(self) -> None:
        """During an abort, `pack`, `cut`, `drop` and `clear` work, so that memory can be saved before a close."""
        with self._backend() as backend:
            decode_slice(backend, 0, 0, self._ids(6))
            before = backend.pack(0, 0, 6)
            run_in_thread(lambda: backend.abort(True))
            require(
                np.array_equal(backend.pack(0, 0, 6), before),
                "a sequence that is packed during an abort has other bytes",
            )
            if backend.limits.can_trim:
                backend.cut(0, 4)
            backend.drop(0)
            backend.clear()

    def test_abort_works_during_a_decode(self) -> None:
        """`abort` works during a decode. Memory that can be cut then continues after a cut, other after `clear`."""
        with self._backend() as backend:
            limits, ids = backend.limits, self._ids(6)
            expected = self._logits_alone(backend, ids, [3, 6])
            n = min(limits.n_batch, limits.n_ubatch, limits.n_ctx - 3)
            running = threading.Event()

            def abort() -> None:
                running.wait()
                backend.abort(True)

            thread = threading.Thread(target=abort)
            thread.start()
            try:
                with raises(BackendError, "a thousand decodes, with an abort among them"):
                    for _ in range(1000):
                        backend.clear()
                        n_held = 0
                        decode_slice(backend, 0, 0, ids[:3])
                        n_held = 3
                        running.set()
                        decode_slice(backend, 0, 3, self._ids(n, seed=1))
            finally:
                running.set()
                thread.join()
            backend.abort(False)
            if limits.can_trim:
                backend.cut(0, n_held)
            else:
                backend.clear()
                n_held = 0
            if not n_held:
                decode_slice(backend, 0, 0, ids[:3])
            self._require_close(decode_slice(backend, 0, 3, ids[3:]), expected, "a sequence after an abort")

    def test_close_may_be_called_twice(self) -> None:
        """`close` may be called twice, and `abort` after it. A decode then raises BackendError."""
        with self._backend() as backend:
            decode_slice(backend, 0, 0, self._ids(4))
            backend.close()
            backend.close()
            with raises(BackendError, "a decode after the close"):
                decode_slice(backend, 0, 0, self._ids(4))
            backend.abort(True)


def _empty_results(n: int, k: int) -> LargestLogits:
    return LargestLogits(np.zeros((n, k), np.intp), np.zeros((n, k), np.float32))
