"""Rules for backends about pack, restore, cut, drop, clear and share.

Part of `BackendConformance`.
"""

from __future__ import annotations

from itertools import pairwise
from unittest import SkipTest

import numpy as np

from erllama.engine.backend import BlockRestorer, PackedBlock
from erllama.errors import BackendError, CellsExhausted, StateError
from erllama.testing.backends.rules import BackendRules, decode_slice, raises, require_same_bits, restore
from erllama.testing.rules import require


class MemoryRules(BackendRules):
    """Rules about packing, restoring, cutting and sharing."""

    # --- pack and restore ---------------------------------------------------------------------------

    def test_pack_changes_nothing(self) -> None:
        """A sequence that was packed continues with the same bits as one that was not."""
        ids = self._ids(10)
        with self._backend() as backend:
            expected = self._logits_alone(backend, ids, [6, 10])
            decode_slice(backend, 0, 0, ids[:6])
            backend.pack(0, 0, 6)
            require_same_bits(decode_slice(backend, 0, 6, ids[6:]), expected, "a sequence that was packed")

    def test_a_packed_payload_does_not_change(self) -> None:
        """`pack` returns uint8, shape (n,), which no later call changes. Packing again returns equal bytes."""
        with self._backend() as backend:
            decode_slice(backend, 0, 0, self._ids(6))
            payload = backend.pack(0, 0, 6)
            require(payload.dtype == np.uint8, f"a payload is {payload.dtype}")
            require(payload.ndim == 1 and len(payload) > 0, f"a payload has shape {payload.shape}")
            before = payload.tobytes()
            require(backend.pack(0, 0, 6).tobytes() == before, "packing again returns other bytes")
            decode_slice(backend, 0, 6, self._ids(4))
            backend.clear()
            decode_slice(backend, 0, 0, self._ids(12, seed=1))
            backend.close()
            require(payload.tobytes() == before, "a payload changed after pack() returned it")

    def test_a_restored_sequence_has_the_same_bits(self) -> None:
        """A sequence that was dropped and restored continues in the same slices with the same bits."""
        ids = self._ids(14)
        with self._backend() as backend:
            expected = [self._logits_alone(backend, ids[:n], [8, n]) for n in (9, 14)]
            decode_slice(backend, 0, 0, ids[:8])
            payload = backend.pack(0, 0, 8)
            for n, logits in zip((9, 14), expected, strict=True):
                backend.drop(0)
                restore(backend, 0, 0, 8, payload)
                require_same_bits(decode_slice(backend, 0, 8, ids[8:n]), logits, "a sequence that was restored")

    def test_a_payload_restores_into_any_sequence(self) -> None:
        """A payload restores into any sequence, beside others, and into any instance of the same namespace."""
        ids = self._ids(12)
        with self._backend() as backend, self._backend() as other:
            expected = self._logits_alone(backend, ids, [8, 12])
            decode_slice(backend, 0, 0, ids[:8])
            payload = backend.pack(0, 0, 8)
            restore(other, 0, 0, 8, payload)
            require_same_bits(
                decode_slice(other, 0, 8, ids[8:]), expected, "a sequence restored into another instance"
            )
            if backend.limits.n_sequences < 2:
                return
            last = backend.limits.n_sequences - 1
            other.clear()
            restore(other, last, 0, 8, payload)
            self._require_close(
                decode_slice(other, last, 8, ids[8:]), expected, f"a sequence restored as sequence {last}"
            )
            restore(backend, last, 0, 8, payload)  # beside the one that it was packed from
            for sequence in (last, 0):
                self._require_close(
                    decode_slice(backend, sequence, 8, ids[8:]), expected, f"sequence {sequence} of two alike"
                )

    def test_blocks_restore_in_order(self) -> None:
        """Blocks that were packed one by one and restored in order have the bits of a sequence that was not packed.

        With `whole_state`, the last block alone restores into an empty sequence.
        """
        ids, ends = self._ids(20), [0, 6, 11, 16]
        with self._backend() as backend:
            expected = self._logits_alone(backend, ids, [*ends[1:], 20])
            blocks = []
            for start, end in pairwise(ends):
                decode_slice(backend, 0, start, ids[start:end])
                blocks.append((start, end, backend.pack(0, start, end)))
            backend.drop(0)
            for start, end, payload in blocks[-1:] if backend.limits.whole_state else blocks:
                restore(backend, 0, start, end, payload)
            require_same_bits(decode_slice(backend, 0, 16, ids[16:]), expected, "a sequence restored in blocks")

    def test_blocks_restore_together(self) -> None:
        """`restore_blocks`, if there is one, restores blocks with the bits of `restore`, one after another.

        If a payload does not fit, it raises StateError, and the sequence does not change.
        """
        ids, ends = self._ids(20), [0, 6, 7, 11, 16]
        with self._backend(trim=True) as backend:
            if not isinstance(backend, BlockRestorer):
                raise SkipTest("a rule for backends that restore blocks together")
            expected = self._logits_alone(backend, ids, [*ends[1:], 20])
            packed = []
            for start, end in pairwise(ends):
                decode_slice(backend, 0, start, ids[start:end])
                packed.append((start, end, backend.pack(0, start, end)))
            for n_held in (0, 1):  # into an empty sequence, and at the end of one
                buffers = [bytearray(payload.tobytes()) for _, _, payload in packed]
                blocks = [
                    PackedBlock(a, b, memoryview(raw)) for (a, b, _), raw in zip(packed, buffers, strict=True)
                ]
                refused = [*blocks[n_held:-1], blocks[-1]._replace(payload=blocks[-1].payload[:-1])]
                backend.drop(0)
                for start, end, payload in packed[:n_held]:
                    restore(backend, 0, start, end, payload)
                with raises(StateError, f"blocks after position {ends[n_held]}, the last of them a byte short"):
                    backend.restore_blocks(0, refused)
                backend.restore_blocks(0, blocks[n_held:])
                for buffer in buffers:
                    buffer[:] = bytes(len(buffer))
                what = f"a sequence of {ends[n_held]} positions to which blocks were restored together"
                require_same_bits(decode_slice(backend, 0, 16, ids[16:]), expected, what)

    def test_any_range_can_be_packed(self) -> None:
        """Where memory can be cut, `pack` accepts any range of positions."""
        ids, cuts = self._ids(20), [0, 1, 7, 15, 16]
        with self._backend(trim=True) as backend:
            expected = self._logits_alone(backend, ids, [16, 20])
            decode_slice(backend, 0, 0, ids[:16])
            blocks = [(start, end, backend.pack(0, start, end)) for start, end in pairwise(cuts)]
            backend.drop(0)
            for start, end, payload in blocks:
                restore(backend, 0, start, end, payload)
            require_same_bits(decode_slice(backend, 0, 16, ids[16:]), expected, "a sequence restored from ranges")

    def test_a_restored_sequence_can_be_packed_again(self) -> None:
        """A restored sequence packs to a payload that restores as well."""
        ids = self._ids(12)
        with self._backend() as backend:
            expected = self._logits_alone(backend, ids, [8, 12])
            decode_slice(backend, 0, 0, ids[:8])
            payload = backend.pack(0, 0, 8)
            backend.drop(0)
            restore(backend, 0, 0, 8, payload)
            again = backend.pack(0, 0, 8)
            backend.clear()
            restore(backend, 0, 0, 8, again)
            require_same_bits(
                decode_slice(backend, 0, 8, ids[8:]), expected, "a sequence packed, restored, packed and restored"
            )

    def test_only_held_positions_can_be_packed(self) -> None:
        """Packing positions that are not held raises BackendError, or returns what `restore` refuses."""
        with self._backend(trim=True) as backend:
            for start, end in ((0, 7), (6, 8)):
                backend.clear()
                decode_slice(backend, 0, 0, self._ids(6))
                with raises(BackendError, f"positions {start} to {end} of a sequence that holds 6"):
                    payload = backend.pack(0, start, end)
                    backend.cut(0, start)
                    restore(backend, 0, start, end, payload)

    def test_an_invalid_payload_is_refused(self) -> None:
        """A payload that is too short, too long or garbage raises StateError, and the sequence does not change."""
        ids = self._ids(14)
        with self._backend() as backend:
            expected = self._logits_alone(backend, ids, [6, 14])
            decode_slice(backend, 0, 0, ids[:6])
            first = backend.pack(0, 0, 6)
            decode_slice(backend, 0, 6, ids[6:10])
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
                        decode_slice(backend, 0, 0, ids[:6])
                    with raises(StateError, f"a payload of positions {start} to {end} that is {what}"):
                        backend.restore(0, start, end, memoryview(wrong))
                    if start:
                        packed = backend.pack(0, 0, 6)
                        require(
                            np.array_equal(packed, first),
                            f"a payload that was refused ({what}) changed the sequence",
                        )
                    else:
                        decode_slice(backend, 0, 0, ids[:6])
                    self._require_close(
                        decode_slice(backend, 0, 6, ids[6:]),
                        expected,
                        f"a sequence after a payload that was {what}",
                    )

    def test_a_payload_restores_only_its_positions(self) -> None:
        """A payload of other positions raises StateError."""
        ids = self._ids(16)
        with self._backend(trim=True) as backend:
            decode_slice(backend, 0, 0, ids)
            first, second = backend.pack(0, 0, 8), backend.pack(0, 8, 16)
            for start, end, payload, what in (
                (8, 16, first, "positions 0 to 8 as 8 to 16"),
                (0, 8, second, "positions 8 to 16 as 0 to 8"),
                (0, 7, first, "8 positions as 7"),
                (8, 17, second, "8 positions as 9"),
            ):
                backend.cut(0, start)
                with raises(StateError, what):
                    restore(backend, 0, start, end, payload)
                decode_slice(backend, 0, start, ids[start:])

    def test_a_payload_restores_only_at_the_end(self) -> None:
        """Where the sequence does not end at `start`, `restore` raises StateError and changes no sequence."""
        ids = self._ids(16)
        with self._backend(trim=True) as backend:
            expected = self._logits_alone(backend, ids, [8, 16])
            decode_slice(backend, 0, 0, ids)
            payload = backend.pack(0, 8, 16)
            for n_held in (9, 4, 0):
                backend.clear()
                if n_held:
                    decode_slice(backend, 0, 0, ids[:n_held])
                with raises(StateError, f"positions from 8 on, for a sequence that holds {n_held}"):
                    restore(backend, 0, 8, 16, payload)
                self._require_close(
                    decode_slice(backend, 0, n_held, ids[n_held:]), expected, f"a sequence that holds {n_held}"
                )

    def test_restore_needs_free_cells(self) -> None:
        """With too few free cells, `restore` raises StateError. With just enough, it works."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx = backend.limits.n_ctx
            decode_slice(backend, 0, 0, self._ids(8))
            payload = backend.pack(0, 0, 8)
            backend.clear()
            self._fill(backend, 0, self._ids(n_ctx - 7))
            with raises(StateError, "8 positions for 7 cells"):
                restore(backend, 1, 0, 8, payload)
            backend.cut(0, n_ctx - 8)
            restore(backend, 1, 0, 8, payload)
            with raises(CellsExhausted, "a token for no cell"):
                decode_slice(backend, 1, 8, self._ids(1))

    # --- cutting, dropping, clearing -------------------------------------------------------------

    def test_cut_tokens_leave_no_trace(self) -> None:
        """After `cut`, a sequence continues with the bits of one that never had the tokens that were cut off."""
        ids = self._ids(14)
        with self._backend(trim=True) as backend:
            expected = self._logits_alone(backend, ids, [8, 14])
            for more in (1, 5):
                backend.clear()
                decode_slice(backend, 0, 0, ids[:8])
                decode_slice(backend, 0, 8, self._ids(more, seed=1))
                backend.cut(0, 8)
                require_same_bits(decode_slice(backend, 0, 8, ids[8:]), expected, "a sequence that was cut")
            backend.cut(0, 0)
            decode_slice(backend, 0, 0, ids[:8])
            require_same_bits(decode_slice(backend, 0, 8, ids[8:]), expected, "a sequence that was cut at 0")

    def test_a_cut_may_split_a_slice(self) -> None:
        """A cut may split a slice. The tokens before it keep the effect that they had."""
        ids = self._ids(14)
        with self._backend(trim=True) as backend:
            expected = self._logits_alone(backend, ids, [5, 14])
            decode_slice(backend, 0, 0, np.append(ids[:5], self._ids(6, seed=1)))
            backend.cut(0, 5)
            self._require_close(decode_slice(backend, 0, 5, ids[5:]), expected, "a sequence cut in a slice")

    def test_a_cut_at_or_after_the_end_changes_nothing(self) -> None:
        """A cut at the end of a sequence, or after it, does not change the sequence."""
        ids = self._ids(14)
        with self._backend(trim=True) as backend:
            expected = self._logits_alone(backend, ids, [8, 14])
            decode_slice(backend, 0, 0, ids[:8])
            backend.cut(0, 8)
            backend.cut(0, 12)
            require_same_bits(
                decode_slice(backend, 0, 8, ids[8:]), expected, "a sequence that was cut at its end and after it"
            )

    def test_memory_that_cannot_be_cut_refuses_it(self) -> None:
        """Where `limits.can_trim` is False, `cut` and `share` raise BackendError and change no sequence."""
        with self._backend() as backend:
            if backend.limits.can_trim:
                raise SkipTest("memory that can be cut")
            ids = self._ids(12)
            expected = self._logits_alone(backend, ids, [8, 12])
            decode_slice(backend, 0, 0, ids[:8])
            with raises(BackendError, "a cut"):
                backend.cut(0, 4)
            if backend.limits.n_sequences > 1:
                with raises(BackendError, "sharing"):
                    backend.share(0, 1, 4)
            require_same_bits(decode_slice(backend, 0, 8, ids[8:]), expected, "a sequence that was not cut")

    def test_drop_empties_one_sequence(self) -> None:
        """`drop` empties one sequence, which then begins at 0, and no other. A second `drop` has no effect."""
        with self._backend(sequences=2) as backend:
            first, second = self._ids(10), self._ids(10, seed=1)
            expected = [self._logits_alone(backend, ids, [6, 10]) for ids in (first, second)]
            decode_slice(backend, 0, 0, first[:6])
            decode_slice(backend, 1, 0, second[:6])
            backend.drop(0)
            backend.drop(0)
            self._require_close(decode_slice(backend, 1, 6, second[6:]), expected[1], "the other sequence")
            decode_slice(backend, 0, 0, first[:6])
            self._require_close(decode_slice(backend, 0, 6, first[6:]), expected[0], "a sequence that begins again")

    def test_clear_empties_every_sequence(self) -> None:
        """After `clear`, all sequences begin again with the bits of a new backend."""
        with self._backend() as backend, self._backend() as fresh:
            n = min(8, backend.limits.n_ctx // backend.limits.n_sequences)
            if not n:
                raise SkipTest("a rule for at least one cell per sequence")
            ids = self._ids(n)
            for sequence in range(backend.limits.n_sequences):
                decode_slice(backend, sequence, 0, self._ids(min(n, 5), seed=sequence))
            backend.clear()
            for sequence in range(backend.limits.n_sequences):
                require_same_bits(
                    decode_slice(backend, sequence, 0, ids),
                    decode_slice(fresh, sequence, 0, ids),
                    f"sequence {sequence}, cleared",
                )

    def test_released_cells_are_free(self) -> None:
        """After `cut`, `drop` or `clear`, another sequence can use every released cell."""
        with self._backend(sequences=2, trim=True) as backend:
            ids = self._ids(backend.limits.n_ctx)
            for release in ("drop", "cut", "clear"):
                self._fill(backend, 0, ids)
                with raises(CellsExhausted, "a token for no cell"):
                    decode_slice(backend, 1, 0, ids[:1])
                if release == "cut":
                    backend.cut(0, 9)
                    self._fill(backend, 1, ids[9:])
                else:
                    backend.drop(0) if release == "drop" else backend.clear()
                    self._fill(backend, 1, ids)
                with raises(CellsExhausted, f"a token for no cell, after {release}"):
                    decode_slice(backend, 0, 9 if release == "cut" else 0, ids[:1])
                backend.clear()

    # --- sharing --------------------------------------------------------------------------------

    def test_sharers_continue_like_their_source(self) -> None:
        """The target continues from `end`, the source from its own end: each as if alone, to `tolerance`."""
        with self._backend(sequences=3, trim=True) as backend:
            ids, other = self._ids(14), self._ids(4, seed=1)
            expected = self._logits_alone(backend, ids, [10, 14])
            diverged = self._logits_alone(backend, np.append(ids[:6], other), [6, 10])
            decode_slice(backend, 0, 0, ids[:10])
            backend.share(0, 1, 10)
            backend.share(0, 2, 6)
            self._require_close(
                decode_slice(backend, 2, 6, other), diverged, "a target that continues with other tokens"
            )
            self._require_close(decode_slice(backend, 1, 10, ids[10:]), expected, "a target")
            self._require_close(decode_slice(backend, 0, 10, ids[10:]), expected, "the source")

    def test_share_takes_no_cells(self) -> None:
        """However many sequences share, the rest of `n_ctx` can be filled, to the last cell."""
        with self._backend(sequences=2, trim=True) as backend:
            n_ctx, n, ids = backend.limits.n_ctx, backend.limits.n_ctx // 2 + 1, self._ids(backend.limits.n_ctx)
            self._fill(backend, 0, ids[:n])
            for target in range(1, backend.limits.n_sequences):
                backend.share(0, target, n)
            self._fill(backend, 1, ids[: n_ctx - n], start=n)
            with raises(CellsExhausted, "a token for no cell"):
                decode_slice(backend, 0, n, ids[:1])

    def test_a_sharer_may_be_dropped(self) -> None:
        """When source or target is dropped or cut, the other does not change. Its last holder frees a cell."""
        with self._backend(sequences=2, trim=True) as backend:
            ids, n_ctx = self._ids(14), backend.limits.n_ctx
            expected = self._logits_alone(backend, ids, [10, 14])
            for dropped, left in ((0, 1), (1, 0)):
                for end in (0, 4):
                    backend.clear()
                    decode_slice(backend, 0, 0, ids[:10])
                    backend.share(0, 1, 10)
                    backend.cut(dropped, end) if end else backend.drop(dropped)
                    # The next tokens must not overwrite cells that are still held.
                    self._fill(backend, dropped, self._ids(n_ctx - 10 - 4, seed=1), start=end)
                    with raises(CellsExhausted, "5 tokens for 4 cells"):
                        decode_slice(backend, left, 10, self._ids(5))
                    self._require_close(
                        decode_slice(backend, left, 10, ids[10:]), expected, f"sequence {left} without {dropped}"
                    )
                    backend.drop(left)
                    backend.drop(dropped)
                    self._fill(backend, 0, self._ids(n_ctx))

    def test_a_shared_sequence_can_be_packed(self) -> None:
        """The positions of a target pack and restore like those of its source."""
        with self._backend(sequences=2, trim=True) as backend:
            ids = self._ids(14)
            expected = self._logits_alone(backend, ids, [10, 14])
            decode_slice(backend, 0, 0, ids[:10])
            backend.share(0, 1, 10)
            payload = backend.pack(1, 0, 10)
            backend.clear()
            restore(backend, 0, 0, 10, payload)
            require_same_bits(
                decode_slice(backend, 0, 10, ids[10:]), expected, "a sequence packed while it was shared"
            )
