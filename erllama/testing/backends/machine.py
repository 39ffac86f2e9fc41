"""A Hypothesis state machine that tries to make a backend give other logits than it should.

First it checks, once, that the backend keeps the rules of `BackendConformance`. Then it calls
all methods, in whatever order Hypothesis finds: it decodes slices of one sequence, and batches of
several, short and long; it packs, drops and restores, shares, cuts and clears, aborts, and gives the
backend payloads that do not fit. What it checks after each call:

* each row of logits is, to `tolerance`, what its sequence's tokens give when they are computed from nothing;
* while one sequence is alone: equal tokens, computed in equal slices, give equal logits to the last bit,
  whether their KV was computed just now or packed, dropped and restored;
* sequences that the call did not name hold what they held;
* cells that a sequence holds are taken, all others are free.

To run it on a backend of your own:

    class Mine(BackendMachine):
        def make_backend(self):
            return MyBackend("model.gguf")

    TestMine = Mine.TestCase
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from erllama.engine.backend import Backend
from erllama.errors import BackendError, StateError
from erllama.testing.backends.conformance import BackendConformance
from erllama.testing.backends.long_rules import random_call
from erllama.testing.backends.model import BackendModel, Packed
from erllama.testing.backends.rules import feed, refused
from erllama.testing.rules import check_rules

_SEQUENCE = 0


class _Piece(NamedTuple):
    """A payload, and how its positions and all before them came to be."""

    packed: Packed
    history: tuple[tuple[int, int, int], ...]


class BackendMachine(RuleBasedStateMachine):
    """Derive from it, give `make_backend`, and run `YourMachine.TestCase`.

    Attributes:
        token_ids: ids to decode; none that ends or controls generation.
        longest: most tokens of one slice.
        tolerance, texts, checks_positions, n_calls, n_tokens: as of `BackendConformance`.
        checks_rules: False where `BackendConformance` runs beside it, so that its rules are not checked twice.
    """

    token_ids: Sequence[int] = tuple(range(3, 8))
    longest = 24
    tolerance = BackendConformance.tolerance
    texts = BackendConformance.texts
    checks_positions = BackendConformance.checks_positions
    n_calls = BackendConformance.n_calls
    n_tokens = BackendConformance.n_tokens
    checks_rules = True

    def make_backend(self) -> Backend:
        """A backend that holds nothing; each one from the same model. Closed at the end of each example."""
        raise NotImplementedError("derive from BackendMachine and define make_backend()")

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        # Within a draw: Hypothesis does not count its time against the deadline of the example.
        data.draw(st.builds(self._check_rules))
        self.backend = self.make_backend()
        self.cold = self.make_backend()
        self.model = BackendModel(self.backend, self.cold, self.tolerance)
        # Of every position that sequence 0 holds: its token, and the slice in which it was computed.
        self.history: tuple[tuple[int, int, int], ...] = ()
        self.alone = True  # no other sequence has held anything since the backend was clear
        self.packed: list[_Piece] = []
        self.seen: dict[tuple[tuple[int, int, int], ...], bytes] = {}
        self.from_many: list[Packed] = []

    def _check_rules(self) -> None:
        """Check the rules, at the first example."""
        if not self.checks_rules:
            return
        backend = self.make_backend()
        kind = type(backend)
        backend.close()
        if kind not in _kept.setdefault(type(self), set()):
            check_rules(_RulesOfBackend(type(self)))
            _kept[type(self)].add(kind)

    def teardown(self) -> None:
        if hasattr(self, "backend"):
            self.backend.close()
            self.cold.close()

    # --- one sequence, to the last bit ---------------------------------------------------------------

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        """Compute a slice; its last row gives logits."""
        self.decode_some(data)

    def decode_some(self, data: st.DataObject) -> None:
        self._be_alone()
        limits, held = self.backend.limits, len(self.history)
        most = min(self.longest, limits.n_batch, limits.n_ubatch, limits.n_ctx - held)
        assume(most > 0)
        self._decode(data.draw(st.lists(st.sampled_from(self.token_ids), min_size=1, max_size=most)))

    @precondition(lambda self: self.alone and self.known_next())
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
        bits = self.model.decode([(_SEQUENCE, ids)])[0].tobytes()
        self.history += tuple((token, held, end) for token in ids)
        assert self.seen.setdefault(self.history, bits) == bits, (
            "decode(): the same tokens, computed in the same slices, gave other bits than before"
        )

    def _be_alone(self) -> None:
        """Only sequence 0 holds something, in cells of its own; else all are emptied."""
        if not self.alone:
            self.model.clear()
            self.history, self.alone = (), True

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A decode that is aborted; what is packed after it is right, or refused."""
        self._be_alone()
        limits, held = self.backend.limits, len(self.history)
        ids = [int(self.token_ids[0])] * min(data.draw(st.integers(1, 8)), self.model.step, limits.n_ctx - held)
        assume(ids)
        self.backend.abort(True)
        try:
            with refused(BackendError, "a decode that is aborted"):
                feed(self.backend, _SEQUENCE, held, np.array(ids, np.int32))
        finally:
            self.backend.abort(False)
        if limits.can_trim:
            self.model.cut(_SEQUENCE, held)
        else:
            self._pack_after_failure()

    def _pack_after_failure(self) -> None:
        held = len(self.history)
        try:
            if held:
                payload = self.backend.pack(_SEQUENCE, 0, held).tobytes()
                self.packed.append(
                    _Piece(Packed(0, held, tuple(self.model.tokens[_SEQUENCE]), payload), self.history)
                )
                return
        except BackendError:
            pass
        self.model.clear()
        self.history = ()

    @precondition(lambda self: self.alone and self.history)
    @rule(data=st.data())
    def pack(self, data: st.DataObject) -> None:
        """Pack what follows the last packed position, up to the end or, where that can be, to any position."""
        held = len(self.history)
        starts = {0} | {p.packed.end for p in self.packed if p.history == self.history[: p.packed.end]}
        start = data.draw(st.sampled_from(sorted(s for s in starts if s <= held)))
        assume(start < held)
        end = held
        if self.backend.limits.can_trim and data.draw(st.booleans()):
            end = data.draw(st.integers(start + 1, held))
        self.packed.append(_Piece(self.model.pack(_SEQUENCE, start, end), self.history[:end]))

    @precondition(lambda self: self.packed)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Empty the sequence and put back what was packed, piece after piece."""
        wanted = data.draw(st.sampled_from(self.packed))
        self._be_alone()
        self.model.drop(_SEQUENCE)
        for piece in self._pieces(wanted):
            self.model.restore(_SEQUENCE, piece.packed)
        self.history = wanted.history
        if known := self.known_next():
            self._decode(data.draw(st.sampled_from(known)))

    def _pieces(self, wanted: _Piece) -> list[_Piece]:
        """Packed pieces that join up to `wanted`."""
        pieces = [wanted]
        while pieces[0].packed.start:
            start, history = pieces[0].packed.start, pieces[0].history
            pieces.insert(0, next(p for p in self.packed if p.packed.end == start and p.history == history[:start]))
        return pieces

    @precondition(lambda self: self.alone and self.history and self.backend.limits.can_trim)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, len(self.history)))
        self.model.cut(_SEQUENCE, end)
        self.history = self.history[:end]

    @precondition(lambda self: self.alone)
    @rule()
    def drop(self) -> None:
        self.model.drop(_SEQUENCE)
        self.history = ()

    @precondition(lambda self: self.packed)
    @rule(data=st.data(), less=st.integers(1, 8))
    def refuse(self, data: st.DataObject, less: int) -> None:
        """A payload that was cut short is refused, and the sequence is as it was."""
        piece = data.draw(st.sampled_from(self.packed)).packed
        self._be_alone()
        assume(piece.start == len(self.history))
        with refused(StateError, "a payload that is too short"):
            self.backend.restore(_SEQUENCE, piece.start, piece.end, memoryview(piece.payload[:-less]))
        self.model.compare(())

    # --- several sequences ---------------------------------------------------------------------------

    @rule(seed=st.integers(0, 2**16), calls=st.integers(1, 12))
    def several(self, seed: int, calls: int) -> None:
        """Calls that name several sequences: batches, shares, cuts, payloads from one to another."""
        self.alone, self.history = False, ()
        random = np.random.Generator(np.random.PCG64(seed))
        for _ in range(calls):
            random_call(self.model, random, self.from_many, list(self.token_ids))

    @rule(seed=st.integers(0, 2**16), length=st.sampled_from([30, 70, 130, 257, 300]))
    def prefill(self, seed: int, length: int) -> None:
        """A long prompt, in a sequence among others."""
        self.alone, self.history = False, ()
        random = np.random.Generator(np.random.PCG64(seed))
        sequence = int(random.integers(self.backend.limits.n_sequences))
        held = sum(map(len, self.model.tokens))
        if held + length > self.backend.limits.n_ctx:
            self.model.clear()
        length = min(length, self.backend.limits.n_ctx)
        self.model.prefill(sequence, [int(t) for t in random.choice(np.array(self.token_ids), length)])

    @rule()
    def clear(self) -> None:
        self.model.clear()
        self.history, self.alone = (), True

    @invariant()
    def names_itself(self) -> None:
        if hasattr(self, "backend"):
            assert len(self.backend.recipe) == 16
            assert self.backend.namespace


class _RulesOfBackend(BackendConformance):
    """The rules, for the backend of a machine."""

    def __init__(self, machine: type[BackendMachine]) -> None:
        self._machine = machine()
        self.tolerance, self.texts = machine.tolerance, machine.texts
        self.token_ids, self.checks_positions = machine.token_ids, machine.checks_positions
        self.n_calls, self.n_tokens = machine.n_calls, machine.n_tokens

    def make_backend(self) -> Backend:
        return self._machine.make_backend()


# Types of backends that have kept the rules, by machine.
_kept: WeakKeyDictionary[type[BackendMachine], set[type[Backend]]] = WeakKeyDictionary()
