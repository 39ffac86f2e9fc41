"""A Hypothesis state machine that tries to make a backend give other logits than it should.

It decodes slices, packs what they made, drops and restores it, cuts, and gives
the backend payloads that do not fit. What it checks after each decode: equal
tokens, computed in equal slices, give equal logits to the last bit, whether
their KV was computed just now or packed, dropped and restored. That is all that
a prompt cache needs of a backend.

To run it on a backend of your own:

    class Mine(BackendMachine):
        def make_backend(self):
            return MyBackend("model.gguf")

    TestMine = Mine.TestCase
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from erllama.engine.backend import Backend, Batch
from erllama.errors import BackendError, StateError

_SEQUENCE = 0


class _Packed(NamedTuple):
    """A payload, the positions it is of, and how they and all before them came to be."""

    start: int
    end: int
    history: tuple[tuple[int, int, int], ...]
    payload: NDArray[np.uint8]


class BackendMachine(RuleBasedStateMachine):
    """Derive from it, give `make_backend`, and run `YourMachine.TestCase`.

    Attributes:
        token_ids: ids to decode; none that ends or controls generation.
        longest: most tokens of one slice.
    """

    token_ids: tuple[int, ...] = tuple(range(3, 8))
    longest = 24

    def make_backend(self) -> Backend:
        """The backend under test; closed at the end of each example."""
        raise NotImplementedError("derive from BackendMachine and define make_backend()")

    @initialize()
    def start(self) -> None:
        self.backend = self.make_backend()
        # Of every position held: its token, and the slice in which it was computed.
        self.history: tuple[tuple[int, int, int], ...] = ()
        self.packed: list[_Packed] = []
        self.seen: dict[tuple[tuple[int, int, int], ...], bytes] = {}

    def teardown(self) -> None:
        if hasattr(self, "backend"):
            self.backend.close()

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        """Compute a slice; its last row gives logits."""
        self.decode_some(data)

    def decode_some(self, data: st.DataObject) -> None:
        limits, held = self.backend.limits, len(self.history)
        most = min(self.longest, limits.n_batch, limits.n_ubatch, limits.n_ctx - held)
        assume(most > 0)
        self._decode(data.draw(st.lists(st.sampled_from(self.token_ids), min_size=1, max_size=most)))

    @precondition(lambda self: self.known_next())
    @rule(data=st.data())
    def decode_again(self, data: st.DataObject) -> None:
        """Compute a slice that has been computed at this place before."""
        self._decode(data.draw(st.sampled_from(self.known_next())))

    def known_next(self) -> list[list[int]]:
        """Slices that once followed just what the sequence holds now."""
        held = len(self.history)
        return [
            [token for token, _, _ in seen[held:]]
            for seen in self.seen
            if len(seen) > held and seen[:held] == self.history and seen[held][1:] == (held, len(seen))
        ]

    def _decode(self, ids: list[int]) -> None:
        held = len(self.history)
        end = held + len(ids)
        output = np.zeros(len(ids), np.int8)
        output[-1] = 1
        positions = np.arange(held, end, dtype=np.int32)
        sequences = np.full(len(ids), _SEQUENCE, np.int32)
        logits = self.backend.decode(Batch(np.array(ids, np.int32), positions, sequences, output))
        assert logits.shape == (1, self.backend.limits.n_vocab), f"logits of shape {logits.shape} for one row"
        self.history += tuple((token, held, end) for token in ids)
        bits = logits.tobytes()
        assert self.seen.setdefault(self.history, bits) == bits, "the same computation gave other logits"

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A decode that is aborted; what is packed after it is right, or refused."""
        before = self.history
        self.backend.abort(True)
        try:
            self.decode_some(data)
        except BackendError:
            self.history = before
            self.backend.abort(False)
            if self.backend.limits.can_trim:
                self.backend.cut(_SEQUENCE, len(before))
            else:
                self._pack_after_failure()
        finally:
            self.backend.abort(False)

    def _pack_after_failure(self) -> None:
        try:
            if not self.history:
                self.backend.clear()
                return
            payload = self.backend.pack(_SEQUENCE, 0, len(self.history))
            self.packed.append(_Packed(0, len(self.history), self.history, payload))
        except BackendError:
            self.backend.clear()
            self.history = ()

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def pack(self, data: st.DataObject) -> None:
        """Pack what follows the last packed position, up to the end or, where that can be, to any position."""
        held = len(self.history)
        starts = {0} | {p.end for p in self.packed if p.history == self.history[: p.end]}
        start = data.draw(st.sampled_from(sorted(s for s in starts if s <= held)))
        assume(start < held)
        end = held
        if self.backend.limits.can_trim and data.draw(st.booleans()):
            end = data.draw(st.integers(start + 1, held))
        payload = self.backend.pack(_SEQUENCE, start, end)
        assert payload.dtype == np.uint8
        assert payload.ndim == 1
        self.packed.append(_Packed(start, end, self.history[:end], payload))

    @precondition(lambda self: self.packed)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Empty the sequence and put back what was packed, piece after piece."""
        wanted = data.draw(st.sampled_from(self.packed))
        self.backend.drop(_SEQUENCE)
        self.history = ()
        for piece in self._pieces(wanted):
            self.backend.restore(_SEQUENCE, piece.start, piece.end, memoryview(piece.payload.tobytes()))
            self.history = piece.history
        if known := self.known_next():
            self._decode(data.draw(st.sampled_from(known)))

    def _pieces(self, wanted: _Packed) -> list[_Packed]:
        """Packed pieces that join up to `wanted`."""
        pieces = [wanted]
        while pieces[0].start:
            start, history = pieces[0].start, pieces[0].history
            pieces.insert(0, next(p for p in self.packed if p.end == start and p.history == history[:start]))
        return pieces

    @precondition(lambda self: self.history and self.backend.limits.can_trim)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, len(self.history)))
        self.backend.cut(_SEQUENCE, end)
        self.history = self.history[:end]

    @rule()
    def drop(self) -> None:
        self.backend.drop(_SEQUENCE)
        self.history = ()

    @precondition(lambda self: self.packed)
    @rule(data=st.data(), less=st.integers(1, 8))
    def refuse(self, data: st.DataObject, less: int) -> None:
        """A payload that was cut short is refused, and the sequence is as it was."""
        piece = data.draw(st.sampled_from(self.packed))
        assume(piece.start == len(self.history))
        short = piece.payload.tobytes()[:-less]
        try:
            self.backend.restore(_SEQUENCE, piece.start, piece.end, memoryview(short))
        except StateError:
            return
        raise AssertionError("a payload that is too short was taken")

    @invariant()
    def names_itself(self) -> None:
        if hasattr(self, "backend"):
            assert len(self.backend.recipe) == 16
            assert self.backend.namespace
