"""What a backend must do, rule by rule, and a test of each.

The docstrings of the methods are the rules. `BackendMachine` then looks for
the order of calls in which a backend that keeps them all still goes wrong.

To run it on a backend of your own, under pytest:

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

from erllama.engine.backend import Batch
from erllama.errors import BackendError, CellsExhausted, StateError
from erllama.testing.backends.embedder_rules import EmbedderRules
from erllama.testing.backends.long_rules import LongRules
from erllama.testing.backends.rules import Part, decode, feed, in_thread, refused, restore, same_bits
from erllama.testing.rules import must, quick_switches


class BackendConformance(LongRules, EmbedderRules):
    """Derive from it, name the class Test…, give `make_backend`, and let pytest run it.

    Give the backend some hundred cells, which are filled to the last, and three
    sequences or more; a rule about more sequences than there are, or about
    memory of another kind, is skipped. It needs no pytest: a method that
    returns has passed, one that raises `unittest.SkipTest` was skipped.

    The attributes are those of `BackendRules`.
    """

    # --- what it says of itself --------------------------------------------------------------------

    def test_limits_are_sane(self) -> None:
        """Sizes are at least 1, a micro-batch is no more than a batch, and each kind of memory is one kind."""
        with self._backend() as backend:
            limits = backend.limits
            sizes = (limits.n_ctx, limits.n_batch, limits.n_ubatch, limits.n_vocab, limits.n_sequences)
            must(min(sizes) >= 1, f"a size below 1: {limits}")
            must(limits.n_ubatch <= limits.n_batch, f"n_ubatch is more than n_batch: {limits}")
            must(limits.attention_window >= 0, f"a negative window: {limits}")
            plain = not limits.whole_state and limits.attention_window == 0
            must(plain or not limits.can_trim, f"memory that can be cut has no window and no whole state: {limits}")

    def test_the_namespace_is_of_plain_values_and_stays(self) -> None:
        """`namespace` maps names to str, int, float, bool or None, and is the same for each instance."""
        with self._backend() as one, self._backend() as other:
            before = dict(one.namespace)
            must(before, "the namespace is empty: any two models would share their KV")
            for name, value in before.items():
                must(isinstance(name, str), f"a name in the namespace is no str: {name!r}")
                must(
                    value is None or isinstance(value, str | int | float | bool),
                    f"namespace[{name!r}] is {value!r}; it must be a str, int, float, bool or None",
                )
            must(before == dict(other.namespace), "two instances have different namespaces")
            feed(one, 0, 0, self._ids(4))
            must(before == dict(one.namespace), "the namespace changed with use")

    def test_the_recipe_is_sixteen_bytes_and_stays(self) -> None:
        """`recipe` is 16 bytes, the same for every instance that computes alike; it and `limits` never change."""
        with self._backend() as one, self._backend() as other:
            must(isinstance(one.recipe, bytes) and len(one.recipe) == 16, f"the recipe is {one.recipe!r}")
            must(one.recipe == other.recipe, "two instances have different recipes")
            before, limits = one.recipe, one.limits
            feed(one, 0, 0, self._ids(4))
            feed(one, 0, 4, self._ids(1))
            must(one.recipe == before, "the recipe changed with use")
            must(one.limits == limits, f"limits changed with use: {limits}, then {one.limits}")
            must(one.limits == other.limits, "two instances have different limits")

    # --- the vocabulary -----------------------------------------------------------------------------

    def test_texts_come_back(self) -> None:
        """Text to tokens gives int32 ids of the vocabulary, shape (n,); tokens to text gives the text's bytes."""
        with self._backend() as backend:
            vocabulary = backend.vocabulary
            for text in self.texts:
                for source in (text, text.encode()):
                    ids = vocabulary.tokenize(source, add_special=False)
                    must(ids.dtype == np.int32 and ids.ndim == 1, f"ids are {ids.dtype}, shape {ids.shape}")
                    must(bool(np.all((ids >= 0) & (ids < vocabulary.n_tokens))), f"ids of no token: {ids}")
                    for given in (ids, ids.tolist()):
                        found = vocabulary.detokenize(given)
                        must(found == text.encode(), f"{text!r} came back as {found!r}")

    def test_pieces_make_up_the_text(self) -> None:
        """The bytes of tokens, one after another, are those of the text, but for a space that some put first."""
        with self._backend() as backend:
            for text in self.texts:
                ids = backend.vocabulary.tokenize(text, add_special=False)
                pieces = b"".join(backend.vocabulary.piece(int(token)) for token in ids)
                must(pieces in (text.encode(), b" " + text.encode()), f"the pieces of {text!r} are {pieces!r}")

    def test_every_token_has_bytes_and_may_end_a_reply(self) -> None:
        """`piece` gives bytes for every token, `is_eog` a bool for each; there is a token for every logit."""
        with self._backend() as backend:
            vocabulary = backend.vocabulary
            must(
                vocabulary.n_tokens >= backend.limits.n_vocab, "logits of tokens that the vocabulary does not have"
            )
            ends = vocabulary.is_eog
            must(ends.dtype == np.bool_, f"is_eog is {ends.dtype}")
            must(ends.shape == (vocabulary.n_tokens,), f"is_eog has shape {ends.shape}")
            must(not ends[list(self.token_ids)].any(), "token_ids has one that ends generation")
            for token in range(vocabulary.n_tokens):
                piece = vocabulary.piece(token)
                must(isinstance(piece, bytes), f"the piece of token {token} is {piece!r}")

    def test_the_vocabulary_is_for_any_thread(self) -> None:
        """Threads that tokenize at the same time, also during a decode, get what one alone gets."""
        texts = [*self.texts, *(f"thread {i} " * i for i in range(1, 9))]

        def text_to_text(first: int) -> None:
            for turn in range(20 * len(texts)):
                text = texts[(first + turn) % len(texts)]
                found = backend.vocabulary.detokenize(backend.vocabulary.tokenize(text, add_special=False))
                must(found == text.encode(), f"with several threads, {text!r} came back as {found!r}")

        with self._backend() as backend, quick_switches(), ThreadPoolExecutor(4) as pool:
            found = [pool.submit(text_to_text, 3 * i) for i in range(4)]
            feed(backend, 0, 0, self._ids(8))
            for each in found:
                each.result()

    # --- decode -------------------------------------------------------------------------------------

    def test_rows_with_output_give_logits_in_their_order(self) -> None:
        """`decode` gives float32, shape (rows with output, n_vocab), finite, in the batch's order."""
        ids, chosen = self._ids(6), [1, 4, 5]
        with self._backend() as backend:
            every = feed(backend, 0, 0, ids, output=range(6))
            must(every.dtype == np.float32, f"logits are {every.dtype}")
            must(every.shape == (6, backend.limits.n_vocab), f"logits of 6 rows have shape {every.shape}")
            must(bool(np.isfinite(every).all()), "logits that are not finite")
            backend.clear()
            some = feed(backend, 0, 0, ids, output=chosen)
            must(some.shape == (3, backend.limits.n_vocab), f"logits of 3 of 6 rows have shape {some.shape}")
            self._close(some, every[chosen], "rows 1, 4 and 5 of a batch")

    def test_rows_without_output_give_none(self) -> None:
        """A batch without output gives shape (0, n_vocab), and its tokens count all the same."""
        ids = self._ids(7)
        with self._backend() as backend:
            nothing = feed(backend, 0, 0, ids[:4], output=())
            must(nothing.shape == (0, backend.limits.n_vocab), f"logits of no row have shape {nothing.shape}")
            silent = feed(backend, 0, 4, ids[4:])
            backend.clear()
            feed(backend, 0, 0, ids[:4])
            self._close(silent, feed(backend, 0, 4, ids[4:]), "a prompt whose first half gave no logits")

    def test_every_token_counts(self) -> None:
        """Logits depend on each token before them: else no mistake in the memory would show."""
        ids = self._ids(8)
        with self._backend() as backend:
            plain = feed(backend, 0, 0, ids)
            for at in range(len(ids)):
                backend.clear()
                other = ids.copy()
                other[at] = next(token for token in self.token_ids if token != ids[at])
                must(
                    not np.array_equal(plain, feed(backend, 0, 0, other)),
                    f"token {at} of {len(ids)} has no effect",
                )

    def test_the_same_batch_gives_the_same_bits(self) -> None:
        """What is computed twice from nothing is the same to the bit: after `clear`, and by another instance."""
        ids = self._ids(9)
        with self._backend() as backend, self._backend() as other:
            first = [feed(backend, 0, 0, ids[:6]), feed(backend, 0, 6, ids[6:])]
            backend.clear()
            for again in (backend, other):
                same_bits(feed(again, 0, 0, ids[:6]), first[0], "the same batch, again")
                same_bits(feed(again, 0, 6, ids[6:]), first[1], "the same second batch, again")

    def test_a_prompt_may_come_in_parts(self) -> None:
        """In one batch, in two, or token by token: the logits are the same, to `tolerance`."""
        ids = self._ids(12)
        with self._backend() as backend:
            whole = feed(backend, 0, 0, ids, output=range(12))
            for cuts in ([0, 5, 12], list(range(13))):
                backend.clear()
                parts = [
                    feed(backend, 0, start, ids[start:end], output=range(end - start))
                    for start, end in pairwise(cuts)
                ]
                self._close(np.concatenate(parts), whole, f"a prompt cut at {cuts}")

    def test_sequences_do_not_see_each_other(self) -> None:
        """A sequence's logits are what they are alone, to `tolerance`, whatever the others hold."""
        with self._backend(sequences=3) as backend:
            prompts = [self._ids(8, seed=i) for i in range(3)]
            alone = [self._alone(backend, ids, [5, 8]) for ids in prompts]
            for i, ids in enumerate(prompts):
                feed(backend, i, 0, ids[:5])
            for i in (2, 0, 1):
                self._close(feed(backend, i, 5, prompts[i][5:]), alone[i], f"sequence {i} among three")

    def test_rows_of_sequences_may_be_mixed(self) -> None:
        """In one batch, one after another or row about row, also of different lengths: each as it is alone."""
        with self._backend(sequences=3) as backend:
            prompts = [self._ids(n, seed=n) for n in (9, 6, 8)]
            alone = [self._alone(backend, ids, [4, len(ids)]) for ids in prompts]
            for mixed in (False, True):
                backend.clear()
                decode(backend, [Part(i, 0, ids[:4]) for i, ids in enumerate(prompts)], mixed=mixed)
                found = decode(backend, [Part(i, 4, ids[4:]) for i, ids in enumerate(prompts)], mixed=mixed)
                for i, logits in enumerate(found):
                    self._close(logits, alone[i], f"sequence {i} of a mixed batch")

    def test_a_prompt_may_be_read_while_others_are_answered(self) -> None:
        """A batch may hold a slice of one sequence's prompt and the last tokens of others."""
        with self._backend(sequences=3) as backend:
            prompts = [self._ids(n, seed=n) for n in (7, 5, 10)]
            alone = [self._alone(backend, ids, [len(ids) - 1, len(ids)]) for ids in prompts[:2]]
            alone.append(self._alone(backend, prompts[2], [10]))
            for i in (0, 1):
                feed(backend, i, 0, prompts[i][:-1])
            parts = [Part(i, len(prompts[i]) - 1, prompts[i][-1:]) for i in (0, 1)] + [Part(2, 0, prompts[2])]
            for i, logits in enumerate(decode(backend, parts)):
                self._close(logits, alone[i], f"sequence {i} beside others")

    # --- what is refused ----------------------------------------------------------------------------

    def test_a_batch_is_no_larger_than_n_batch(self) -> None:
        """A larger batch raises BackendError; after `clear` all is well."""
        with self._backend() as backend:
            before = feed(backend, 0, 0, self._ids(5))
            backend.clear()
            with refused(BackendError, "a batch of n_batch + 1 tokens"):
                feed(backend, 0, 0, self._ids(backend.limits.n_batch + 1))
            backend.clear()
            same_bits(feed(backend, 0, 0, self._ids(5)), before, "a batch after one that was too large")

    def test_positions_follow_on(self) -> None:
        """Positions that leave a gap or go back raise BackendError; after `clear` all is well."""
        self._refuses_positions(([6, 7], [3, 4], [5, 7], [6, 5]))

    def test_positions_do_not_repeat(self) -> None:
        """A position that comes twice in a batch raises BackendError; after `clear` all is well."""
        self._refuses_positions(([5, 5],))

    def _refuses_positions(self, wrong: Sequence[Sequence[int]]) -> None:
        if not self.checks_positions:
            raise SkipTest("a backend that trusts positions")
        ids, sequences, output = self._ids(7), np.zeros(2, np.int32), np.array([0, 1], np.int8)
        with self._backend() as backend:
            expected = self._alone(backend, ids, [5, 7])
            for positions in wrong:
                feed(backend, 0, 0, ids[:5])
                with refused(BackendError, f"positions {positions} after 5 held"):
                    backend.decode(Batch(ids[5:], np.array(positions, np.int32), sequences, output))
                same_bits(self._alone(backend, ids, [5, 7]), expected, "what comes after wrong positions")

    def test_a_batch_that_does_not_fit_changes_nothing(self) -> None:
        """Fewer free cells than rows: CellsExhausted, nothing is computed, and what does fit goes on as before."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx, ids, last = backend.limits.n_ctx, self._ids(backend.limits.n_ctx), backend.limits.n_sequences - 1
            expected = self._fill(backend, 0, ids)
            backend.clear()
            self._fill(backend, 0, ids[:-3])
            before = backend.pack(0, 0, n_ctx - 3)
            with refused(CellsExhausted, "4 tokens for 3 cells"):
                feed(backend, last, 0, ids[:4])
            must(np.array_equal(before, backend.pack(0, 0, n_ctx - 3)), "a batch that was refused left a trace")
            self._close(feed(backend, 0, n_ctx - 3, ids[-3:]), expected, "a batch after one that did not fit")

    def test_a_mixed_batch_that_does_not_fit_changes_no_sequence(self) -> None:
        """CellsExhausted for rows of several sequences: none of them got any."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx, ids, other = backend.limits.n_ctx, self._ids(backend.limits.n_ctx), self._ids(8, seed=1)
            expected = self._alone(backend, other[:4], [2, 4])
            feed(backend, 1, 0, other[:2])
            self._fill(backend, 0, ids[:-6])  # 4 cells are free
            with refused(CellsExhausted, "5 tokens for 4 cells"):
                decode(backend, [Part(0, n_ctx - 6, ids[:2]), Part(1, 2, other[2:5])])
            logits = decode(backend, [Part(0, n_ctx - 6, ids[:2]), Part(1, 2, other[2:4])])
            self._close(logits[1], expected, "a sequence whose batch did not fit at first")

    def test_a_sequence_is_no_longer_than_the_context(self) -> None:
        """Positions from n_ctx on have no cells: CellsExhausted, and the sequence goes on as before."""
        with self._backend(trim=True) as backend:
            n_ctx, ids = backend.limits.n_ctx, self._ids(backend.limits.n_ctx)
            expected = self._fill(backend, 0, ids)
            with refused(CellsExhausted, "a token after the last cell"):
                feed(backend, 0, n_ctx, ids[:1])
            backend.clear()
            self._fill(backend, 0, ids[:-3])
            with refused(CellsExhausted, "4 tokens for 3 cells"):
                feed(backend, 0, n_ctx - 3, ids[:4])
            self._close(feed(backend, 0, n_ctx - 3, ids[-3:]), expected, "a batch after one that did not fit")

    # --- pack and restore ---------------------------------------------------------------------------

    def test_packing_changes_nothing(self) -> None:
        """A sequence that was packed goes on with the bits of one that was not."""
        ids = self._ids(10)
        with self._backend() as backend:
            expected = self._alone(backend, ids, [6, 10])
            feed(backend, 0, 0, ids[:6])
            backend.pack(0, 0, 6)
            same_bits(feed(backend, 0, 6, ids[6:]), expected, "a sequence that was packed")

    def test_a_payload_is_the_callers(self) -> None:
        """`pack` gives uint8, shape (n,), which nothing that follows changes; packed again, it is the same."""
        with self._backend() as backend:
            feed(backend, 0, 0, self._ids(6))
            payload = backend.pack(0, 0, 6)
            must(payload.dtype == np.uint8, f"a payload is {payload.dtype}")
            must(payload.ndim == 1 and len(payload) > 0, f"a payload has shape {payload.shape}")
            before = payload.tobytes()
            must(backend.pack(0, 0, 6).tobytes() == before, "packed again, it is other bytes")
            feed(backend, 0, 6, self._ids(4))
            backend.clear()
            feed(backend, 0, 0, self._ids(12, seed=1))
            backend.close()
            must(payload.tobytes() == before, "a payload changed after it was given away")

    def test_what_comes_back_has_the_bits_of_what_never_left(self) -> None:
        """Dropped and restored, a sequence goes on in the same slices with the same bits."""
        ids = self._ids(14)
        with self._backend() as backend:
            expected = [self._alone(backend, ids[:n], [8, n]) for n in (9, 14)]
            feed(backend, 0, 0, ids[:8])
            payload = backend.pack(0, 0, 8)
            for n, logits in zip((9, 14), expected, strict=True):
                backend.drop(0)
                restore(backend, 0, 0, 8, payload)
                same_bits(feed(backend, 0, 8, ids[8:n]), logits, "a sequence that was restored")

    def test_a_payload_may_go_anywhere(self) -> None:
        """Into another sequence, beside others, and into another instance of the same namespace."""
        ids = self._ids(12)
        with self._backend() as backend, self._backend() as other:
            expected = self._alone(backend, ids, [8, 12])
            feed(backend, 0, 0, ids[:8])
            payload = backend.pack(0, 0, 8)
            restore(other, 0, 0, 8, payload)
            same_bits(feed(other, 0, 8, ids[8:]), expected, "a sequence restored into another instance")
            if backend.limits.n_sequences < 2:
                return
            last = backend.limits.n_sequences - 1
            other.clear()
            restore(other, last, 0, 8, payload)
            self._close(feed(other, last, 8, ids[8:]), expected, f"a sequence restored as sequence {last}")
            restore(backend, last, 0, 8, payload)  # beside the one that it was packed from
            for sequence in (last, 0):
                self._close(feed(backend, sequence, 8, ids[8:]), expected, f"sequence {sequence} of two alike")

    def test_blocks_come_back_one_after_another(self) -> None:
        """Each packed as it was computed, and restored in order: the bits of what never left.

        Where `whole_state`, the last alone, into an empty sequence.
        """
        ids, ends = self._ids(20), [0, 6, 11, 16]
        with self._backend() as backend:
            expected = self._alone(backend, ids, [*ends[1:], 20])
            blocks = []
            for start, end in pairwise(ends):
                feed(backend, 0, start, ids[start:end])
                blocks.append((start, end, backend.pack(0, start, end)))
            backend.drop(0)
            for start, end, payload in blocks[-1:] if backend.limits.whole_state else blocks:
                restore(backend, 0, start, end, payload)
            same_bits(feed(backend, 0, 16, ids[16:]), expected, "a sequence restored in blocks")

    def test_any_range_can_be_packed(self) -> None:
        """Where memory can be cut, from any position to any."""
        ids, cuts = self._ids(20), [0, 1, 7, 15, 16]
        with self._backend(trim=True) as backend:
            expected = self._alone(backend, ids, [16, 20])
            feed(backend, 0, 0, ids[:16])
            blocks = [(start, end, backend.pack(0, start, end)) for start, end in pairwise(cuts)]
            backend.drop(0)
            for start, end, payload in blocks:
                restore(backend, 0, start, end, payload)
            same_bits(feed(backend, 0, 16, ids[16:]), expected, "a sequence restored from ranges")

    def test_what_is_restored_can_be_packed_again(self) -> None:
        """A payload that is restored packs to a payload that serves as well."""
        ids = self._ids(12)
        with self._backend() as backend:
            expected = self._alone(backend, ids, [8, 12])
            feed(backend, 0, 0, ids[:8])
            payload = backend.pack(0, 0, 8)
            backend.drop(0)
            restore(backend, 0, 0, 8, payload)
            again = backend.pack(0, 0, 8)
            backend.clear()
            restore(backend, 0, 0, 8, again)
            same_bits(feed(backend, 0, 8, ids[8:]), expected, "a sequence packed, restored, packed and restored")

    def test_only_what_is_held_can_be_packed(self) -> None:
        """Packing what the sequence does not hold raises BackendError, or gives what `restore` refuses."""
        with self._backend(trim=True) as backend:
            for start, end in ((0, 7), (6, 8)):
                backend.clear()
                feed(backend, 0, 0, self._ids(6))
                with refused(BackendError, f"positions {start} to {end} of a sequence that holds 6"):
                    payload = backend.pack(0, start, end)
                    backend.cut(0, start)
                    restore(backend, 0, start, end, payload)

    def test_a_payload_that_does_not_fit_is_refused(self) -> None:
        """Too short, too long or garbage, it raises StateError; the sequence is as it was."""
        ids = self._ids(14)
        with self._backend() as backend:
            expected = self._alone(backend, ids, [6, 14])
            feed(backend, 0, 0, ids[:6])
            first = backend.pack(0, 0, 6)
            feed(backend, 0, 6, ids[6:10])
            second = backend.pack(0, 6, 10)
            # Once into an empty sequence, once at the end of one.
            for start, end, payload in ((0, 6, first), (6, 10, second)):
                raw = payload.tobytes()
                for wrong, what in (
                    (raw[:-1], "a byte short"),
                    (raw[: len(raw) // 2], "half"),
                    (b"", "empty"),
                    (raw + b"\0", "a byte long"),
                    (bytes(len(raw)), "zeros"),
                ):
                    backend.clear()
                    if start:
                        feed(backend, 0, 0, ids[:6])
                    with refused(StateError, f"a payload of positions {start} to {end} that is {what}"):
                        backend.restore(0, start, end, memoryview(wrong))
                    if start:
                        held = backend.pack(0, 0, 6)
                        must(
                            np.array_equal(held, first), f"a payload that was refused ({what}) changed the sequence"
                        )
                    else:
                        feed(backend, 0, 0, ids[:6])
                    self._close(
                        feed(backend, 0, 6, ids[6:]), expected, f"a sequence after a payload that was {what}"
                    )

    def test_a_payload_is_of_its_positions(self) -> None:
        """A payload of other positions raises StateError."""
        ids = self._ids(16)
        with self._backend(trim=True) as backend:
            feed(backend, 0, 0, ids)
            first, second = backend.pack(0, 0, 8), backend.pack(0, 8, 16)
            for start, end, payload, what in (
                (8, 16, first, "positions 0 to 8 as 8 to 16"),
                (0, 8, second, "positions 8 to 16 as 0 to 8"),
                (0, 7, first, "8 positions as 7"),
                (8, 17, second, "8 positions as 9"),
            ):
                backend.cut(0, start)
                with refused(StateError, what):
                    restore(backend, 0, start, end, payload)
                feed(backend, 0, start, ids[start:])

    def test_a_payload_goes_to_the_end(self) -> None:
        """Where the sequence does not end at `start`, StateError; the sequence is as it was."""
        ids = self._ids(16)
        with self._backend(trim=True) as backend:
            expected = self._alone(backend, ids, [8, 16])
            feed(backend, 0, 0, ids)
            payload = backend.pack(0, 8, 16)
            for held in (9, 4, 0):
                backend.clear()
                if held:
                    feed(backend, 0, 0, ids[:held])
                with refused(StateError, f"positions from 8 on, for a sequence that holds {held}"):
                    restore(backend, 0, 8, 16, payload)
                self._close(feed(backend, 0, held, ids[held:]), expected, f"a sequence that holds {held}")

    def test_restoring_takes_cells(self) -> None:
        """Where too few are free, StateError; where just enough, it fits."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx = backend.limits.n_ctx
            feed(backend, 0, 0, self._ids(8))
            payload = backend.pack(0, 0, 8)
            backend.clear()
            self._fill(backend, 0, self._ids(n_ctx - 7))
            with refused(StateError, "8 positions for 7 cells"):
                restore(backend, 1, 0, 8, payload)
            backend.cut(0, n_ctx - 8)
            restore(backend, 1, 0, 8, payload)
            with refused(CellsExhausted, "a token for no cell"):
                feed(backend, 1, 8, self._ids(1))

    # --- cutting, dropping, clearing -------------------------------------------------------------

    def test_a_sequence_that_was_cut_was_never_longer(self) -> None:
        """Cut and gone on, it has the bits of one that never had what was cut off."""
        ids = self._ids(14)
        with self._backend(trim=True) as backend:
            expected = self._alone(backend, ids, [8, 14])
            for more in (1, 5):
                backend.clear()
                feed(backend, 0, 0, ids[:8])
                feed(backend, 0, 8, self._ids(more, seed=1))
                backend.cut(0, 8)
                same_bits(feed(backend, 0, 8, ids[8:]), expected, "a sequence that was cut")
            backend.cut(0, 0)
            feed(backend, 0, 0, ids[:8])
            same_bits(feed(backend, 0, 8, ids[8:]), expected, "a sequence that was cut to nothing")

    def test_cutting_in_the_middle_of_a_slice(self) -> None:
        """A cut may fall anywhere; what is left counts as it was computed."""
        ids = self._ids(14)
        with self._backend(trim=True) as backend:
            expected = self._alone(backend, ids, [5, 14])
            feed(backend, 0, 0, np.append(ids[:5], self._ids(6, seed=1)))
            backend.cut(0, 5)
            self._close(feed(backend, 0, 5, ids[5:]), expected, "a sequence cut in a slice")

    def test_cutting_what_is_not_there_changes_nothing(self) -> None:
        """A cut at the sequence's end, or after it, leaves it as it is."""
        ids = self._ids(14)
        with self._backend(trim=True) as backend:
            expected = self._alone(backend, ids, [8, 14])
            feed(backend, 0, 0, ids[:8])
            backend.cut(0, 8)
            backend.cut(0, 12)
            same_bits(feed(backend, 0, 8, ids[8:]), expected, "a sequence that was cut at its end and after it")

    def test_memory_that_cannot_be_cut_says_so(self) -> None:
        """Where `limits.can_trim` is False, `cut` and `share` raise BackendError, and change nothing."""
        with self._backend() as backend:
            if backend.limits.can_trim:
                raise SkipTest("memory that can be cut")
            ids = self._ids(12)
            expected = self._alone(backend, ids, [8, 12])
            feed(backend, 0, 0, ids[:8])
            with refused(BackendError, "a cut"):
                backend.cut(0, 4)
            if backend.limits.n_sequences > 1:
                with refused(BackendError, "sharing"):
                    backend.share(0, 1, 4)
            same_bits(feed(backend, 0, 8, ids[8:]), expected, "a sequence that was not cut")

    def test_a_dropped_sequence_is_empty_and_alone(self) -> None:
        """`drop` empties one sequence, which begins anew at 0; the others stay. Twice does no harm."""
        with self._backend(sequences=2) as backend:
            first, second = self._ids(10), self._ids(10, seed=1)
            expected = [self._alone(backend, ids, [6, 10]) for ids in (first, second)]
            feed(backend, 0, 0, first[:6])
            feed(backend, 1, 0, second[:6])
            backend.drop(0)
            backend.drop(0)
            self._close(feed(backend, 1, 6, second[6:]), expected[1], "the other sequence")
            feed(backend, 0, 0, first[:6])
            self._close(feed(backend, 0, 6, first[6:]), expected[0], "the sequence, begun anew")

    def test_clear_empties_every_sequence(self) -> None:
        """After `clear` all begin anew, with the bits of a new backend."""
        with self._backend() as backend, self._backend() as fresh:
            n = min(8, backend.limits.n_ctx // backend.limits.n_sequences)
            if not n:
                raise SkipTest("a rule for a cell and more for each sequence")
            ids = self._ids(n)
            for sequence in range(backend.limits.n_sequences):
                feed(backend, sequence, 0, self._ids(min(n, 5), seed=sequence))
            backend.clear()
            for sequence in range(backend.limits.n_sequences):
                same_bits(
                    feed(backend, sequence, 0, ids),
                    feed(fresh, sequence, 0, ids),
                    f"sequence {sequence}, cleared",
                )

    def test_cells_that_are_let_go_are_free(self) -> None:
        """After `cut`, `drop` or `clear`, another sequence can take them, to the last."""
        with self._backend(sequences=2, trim=True) as backend:
            ids = self._ids(backend.limits.n_ctx)
            for let_go in ("drop", "cut", "clear"):
                self._fill(backend, 0, ids)
                with refused(CellsExhausted, "a token for no cell"):
                    feed(backend, 1, 0, ids[:1])
                if let_go == "cut":
                    backend.cut(0, 9)
                    self._fill(backend, 1, ids[9:])
                else:
                    backend.drop(0) if let_go == "drop" else backend.clear()
                    self._fill(backend, 1, ids)
                with refused(CellsExhausted, f"a token for no cell, after {let_go}"):
                    feed(backend, 0, 9 if let_go == "cut" else 0, ids[:1])
                backend.clear()

    # --- sharing --------------------------------------------------------------------------------

    def test_what_is_shared_goes_on_as_its_source_would(self) -> None:
        """The target continues from `end`, the source from where it was: each as if alone, to `tolerance`."""
        with self._backend(sequences=3, trim=True) as backend:
            ids, other = self._ids(14), self._ids(4, seed=1)
            expected = self._alone(backend, ids, [10, 14])
            diverged = self._alone(backend, np.append(ids[:6], other), [6, 10])
            feed(backend, 0, 0, ids[:10])
            backend.share(0, 1, 10)
            backend.share(0, 2, 6)
            self._close(feed(backend, 2, 6, other), diverged, "a target that goes another way")
            self._close(feed(backend, 1, 10, ids[10:]), expected, "a target")
            self._close(feed(backend, 0, 10, ids[10:]), expected, "the source")

    def test_sharing_takes_no_cells(self) -> None:
        """However many share, the rest of `n_ctx` can be filled, to the last cell."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx, n, ids = backend.limits.n_ctx, backend.limits.n_ctx // 2 + 1, self._ids(backend.limits.n_ctx)
            self._fill(backend, 0, ids[:n])
            for target in range(1, backend.limits.n_sequences):
                backend.share(0, target, n)
            self._fill(backend, 1, ids[: n_ctx - n], start=n)
            with refused(CellsExhausted, "a token for no cell"):
                feed(backend, 0, n, ids[:1])

    def test_who_shares_may_go(self) -> None:
        """Source or target dropped or cut, the other is whole; a cell is free when the last has let go."""
        with self._backend(sequences=2, trim=True) as backend:
            ids, n_ctx = self._ids(14), backend.limits.n_ctx
            expected = self._alone(backend, ids, [10, 14])
            for gone, left in ((0, 1), (1, 0)):
                for end in (0, 4):
                    backend.clear()
                    feed(backend, 0, 0, ids[:10])
                    backend.share(0, 1, 10)
                    backend.cut(gone, end) if end else backend.drop(gone)
                    # Whoever comes next must not write over what is still held.
                    self._fill(backend, gone, self._ids(n_ctx - 10 - 4, seed=1), start=end)
                    with refused(CellsExhausted, "5 tokens for 4 cells"):
                        feed(backend, left, 10, self._ids(5))
                    self._close(feed(backend, left, 10, ids[10:]), expected, f"sequence {left} without {gone}")
                    backend.drop(left)
                    backend.drop(gone)
                    self._fill(backend, 0, self._ids(n_ctx))

    def test_what_is_shared_can_be_packed(self) -> None:
        """A target's positions pack and restore as its source's."""
        with self._backend(sequences=2, trim=True) as backend:
            ids = self._ids(14)
            expected = self._alone(backend, ids, [10, 14])
            feed(backend, 0, 0, ids[:10])
            backend.share(0, 1, 10)
            payload = backend.pack(1, 0, 10)
            backend.clear()
            restore(backend, 0, 0, 10, payload)
            same_bits(feed(backend, 0, 10, ids[10:]), expected, "a sequence packed while it was shared")

    # --- aborting and closing ---------------------------------------------------------------------

    def test_an_abort_ends_decodes_until_it_is_taken_back(self) -> None:
        """After `abort(True)` in another thread, decodes raise BackendError, until `abort(False)`."""
        ids = self._ids(8)
        with self._backend() as backend:
            expected = self._alone(backend, ids, [8])
            in_thread(lambda: backend.abort(True))
            for _ in range(2):
                with refused(BackendError, "a decode that is aborted"):
                    feed(backend, 0, 0, ids)
            in_thread(lambda: backend.abort(False))
            backend.clear()
            same_bits(feed(backend, 0, 0, ids), expected, "a decode after an abort")

    def test_an_abort_ends_decodes_alone(self) -> None:
        """While it lasts, what is held can be packed, cut, dropped and cleared: so it is saved before a close."""
        with self._backend() as backend:
            feed(backend, 0, 0, self._ids(6))
            before = backend.pack(0, 0, 6)
            in_thread(lambda: backend.abort(True))
            must(np.array_equal(backend.pack(0, 0, 6), before), "packed during an abort, it is other bytes")
            if backend.limits.can_trim:
                backend.cut(0, 4)
            backend.drop(0)
            backend.clear()

    def test_an_abort_may_come_at_any_time(self) -> None:
        """Also in the midst of a decode. Memory that can be cut is then cut back, and goes on; other is cleared."""
        with self._backend() as backend:
            limits, ids = backend.limits, self._ids(6)
            expected = self._alone(backend, ids, [3, 6])
            n = min(limits.n_batch, limits.n_ubatch, limits.n_ctx - 3)
            running = threading.Event()

            def abort() -> None:
                running.wait()
                backend.abort(True)

            thread = threading.Thread(target=abort)
            thread.start()
            try:
                with refused(BackendError, "a thousand decodes, with an abort among them"):
                    for _ in range(1000):
                        backend.clear()
                        held = 0
                        feed(backend, 0, 0, ids[:3])
                        held = 3
                        running.set()
                        feed(backend, 0, 3, self._ids(n, seed=1))
            finally:
                running.set()
                thread.join()
            backend.abort(False)
            if limits.can_trim:
                backend.cut(0, held)
            else:
                backend.clear()
                held = 0
            if not held:
                feed(backend, 0, 0, ids[:3])
            self._close(feed(backend, 0, 3, ids[3:]), expected, "a sequence after an abort")

    def test_closing_twice_does_no_harm(self) -> None:
        """`close` may come again, and `abort` after it; a decode then raises BackendError."""
        with self._backend() as backend:
            feed(backend, 0, 0, self._ids(4))
            backend.close()
            backend.close()
            with refused(BackendError, "a decode after the close"):
                feed(backend, 0, 0, self._ids(4))
            backend.abort(True)
