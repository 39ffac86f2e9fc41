"""Hypothesis state machine that searches for calls after which a backend returns wrong logits.

First it checks, once, that the backend follows the rules of `BackendConformance`. Then it calls all methods, in any
order that Hypothesis finds. It decodes slices of one sequence and batches of several, short and long. It packs,
drops, restores, shares, cuts, clears and aborts, and passes payloads that do not fit. After each call it checks
that:

* each row of logits is, to `tolerance`, the row that a second instance computes for the same tokens;
* while only one sequence is used: equal tokens, computed in equal slices, give equal logits to the last bit,
  whether their KV was computed just now or packed, dropped and restored;
* sequences that the call does not name have not changed;
* the cells that sequences hold are occupied, and all others are free.

To run it on your own backend:

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
from erllama.testing.backends.model import BackendModel, PackedRange
from erllama.testing.backends.rules import decode_slice, raises
from erllama.testing.rules import check_rules

_SEQUENCE = 0


class _PackedSlices(NamedTuple):
    """A payload, with the history of its positions and of all positions before them."""

    packed: PackedRange
    history: tuple[tuple[int, int, int], ...]


class BackendMachine(RuleBasedStateMachine):
    """State machine for backends. Derive from it, define `make_backend`, and run `YourMachine.TestCase`.

    Attributes:
        token_ids: ids to decode, without tokens that end or control generation.
        longest: maximum number of tokens of one slice.
        tolerance, texts, checks_positions, n_calls, n_tokens: as of `BackendConformance`.
        checks_rules: False if `BackendConformance` runs as well, so that its rules are not checked twice.
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
        """Return an empty backend, each time from the same model. Closed at the end of each example."""
        raise NotImplementedError("derive from BackendMachine and define make_backend()")

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        # Within a draw, because Hypothesis does not count that time against the deadline of the example.
        data.draw(st.builds(self._check_rules))
        self.backend = self.make_backend()
        self.cold = self.make_backend()
        self.model = BackendModel(self.backend, self.cold, self.tolerance)
        # For every position that sequence 0 holds: its token, and start and end of the slice that computed it.
        self.history: tuple[tuple[int, int, int], ...] = ()
        self.one_sequence = True  # no other sequence was used since the last clear
        self.packed: list[_PackedSlices] = []
        self.bits: dict[tuple[tuple[int, int, int], ...], bytes] = {}
        self.packed_ranges: list[PackedRange] = []

    def _check_rules(self) -> None:
        """Check the rules, once for each type of backend."""
        if not self.checks_rules:
            return
        backend = self.make_backend()
        kind = type(backend)
        backend.close()
        if kind not in _checked_types.setdefault(type(self), set()):
            check_rules(_MachineRules(type(self)))
            _checked_types[type(self)].add(kind)

    def teardown(self) -> None:
        if hasattr(self, "backend"):
            self.backend.close()
            self.cold.close()

    # --- one sequence, to the last bit ---------------------------------------------------------------

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        """Compute a slice with logits of its last row."""
        self.decode_any_slice(data)

    def decode_any_slice(self, data: st.DataObject) -> None:
        self._keep_one_sequence()
        limits, n_held = self.backend.limits, len(self.history)
        max_tokens = min(self.longest, limits.n_batch, limits.n_ubatch, limits.n_ctx - n_held)
        assume(max_tokens > 0)
        self._decode(data.draw(st.lists(st.sampled_from(self.token_ids), min_size=1, max_size=max_tokens)))

    @precondition(lambda self: self.one_sequence and self.known_next())
    @rule(data=st.data())
    def decode_again(self, data: st.DataObject) -> None:
        """Compute a slice again that was computed at this place before."""
        self._decode(data.draw(st.sampled_from(self.known_next())))

    def known_next(self) -> list[list[int]]:
        """Return the slices that were computed before after the tokens that the sequence holds now."""
        n_held = len(self.history)
        return [
            [token for token, _, _ in seen[n_held:]]
            for seen in self.bits
            if len(seen) > n_held and seen[:n_held] == self.history and seen[n_held][1:] == (n_held, len(seen))
        ]

    def _decode(self, ids: list[int]) -> None:
        n_held = len(self.history)
        end = n_held + len(ids)
        bits = self.model.decode([(_SEQUENCE, ids)])[0].tobytes()
        self.history += tuple((token, n_held, end) for token in ids)
        assert self.bits.setdefault(self.history, bits) == bits, (
            "decode(): the same tokens, computed in the same slices, have other bits than before"
        )

    def _keep_one_sequence(self) -> None:
        """Clear the backend, unless only sequence 0 was used since the last clear."""
        if not self.one_sequence:
            self.model.clear()
            self.history, self.one_sequence = (), True

    @rule(data=st.data())
    def fail_decode(self, data: st.DataObject) -> None:
        """Abort a decode. A payload that is packed afterwards must be right, or refused."""
        self._keep_one_sequence()
        limits, n_held = self.backend.limits, len(self.history)
        ids = [int(self.token_ids[0])] * min(
            data.draw(st.integers(1, 8)), self.model.max_slice, limits.n_ctx - n_held
        )
        assume(ids)
        self.backend.abort(True)
        try:
            with raises(BackendError, "an aborted decode"):
                decode_slice(self.backend, _SEQUENCE, n_held, np.array(ids, np.int32))
        finally:
            self.backend.abort(False)
        if limits.can_trim:
            self.model.cut(_SEQUENCE, n_held)
        else:
            self._pack_after_failure()

    def _pack_after_failure(self) -> None:
        n_held = len(self.history)
        try:
            if n_held:
                payload = self.backend.pack(_SEQUENCE, 0, n_held).tobytes()
                self.packed.append(
                    _PackedSlices(
                        PackedRange(0, n_held, tuple(self.model.tokens[_SEQUENCE]), payload), self.history
                    )
                )
                return
        except BackendError:
            pass
        self.model.clear()
        self.history = ()

    @precondition(lambda self: self.one_sequence and self.history)
    @rule(data=st.data())
    def pack(self, data: st.DataObject) -> None:
        """Pack from the end of an earlier payload to the end of the sequence or, if possible, to any position."""
        n_held = len(self.history)
        starts = {0} | {p.packed.end for p in self.packed if p.history == self.history[: p.packed.end]}
        start = data.draw(st.sampled_from(sorted(s for s in starts if s <= n_held)))
        assume(start < n_held)
        end = n_held
        if self.backend.limits.can_trim and data.draw(st.booleans()):
            end = data.draw(st.integers(start + 1, n_held))
        self.packed.append(_PackedSlices(self.model.pack(_SEQUENCE, start, end), self.history[:end]))

    @precondition(lambda self: self.packed)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Empty the sequence and restore packed ranges in order."""
        target = data.draw(st.sampled_from(self.packed))
        self._keep_one_sequence()
        self.model.drop(_SEQUENCE)
        for piece in self._pieces(target):
            self.model.restore(_SEQUENCE, piece.packed)
        self.history = target.history
        if known := self.known_next():
            self._decode(data.draw(st.sampled_from(known)))

    def _pieces(self, target: _PackedSlices) -> list[_PackedSlices]:
        """Return packed ranges that join to one from position 0 to the end of `target`."""
        pieces = [target]
        while pieces[0].packed.start:
            start, history = pieces[0].packed.start, pieces[0].history
            pieces.insert(0, next(p for p in self.packed if p.packed.end == start and p.history == history[:start]))
        return pieces

    @precondition(lambda self: self.one_sequence and self.history and self.backend.limits.can_trim)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, len(self.history)))
        self.model.cut(_SEQUENCE, end)
        self.history = self.history[:end]

    @precondition(lambda self: self.one_sequence)
    @rule()
    def drop(self) -> None:
        self.model.drop(_SEQUENCE)
        self.history = ()

    @precondition(lambda self: self.packed)
    @rule(data=st.data(), less=st.integers(1, 8))
    def refuse_truncated_payload(self, data: st.DataObject, less: int) -> None:
        """Restore a truncated payload. It must be refused, and the sequence must not change."""
        piece = data.draw(st.sampled_from(self.packed)).packed
        self._keep_one_sequence()
        assume(piece.start == len(self.history))
        with raises(StateError, "a payload that is too short"):
            self.backend.restore(_SEQUENCE, piece.start, piece.end, memoryview(piece.payload[:-less]))
        self.model.compare(())

    # --- several sequences ---------------------------------------------------------------------------

    @rule(seed=st.integers(0, 2**16), calls=st.integers(1, 12))
    def several_sequences(self, seed: int, calls: int) -> None:
        """Make random calls that name several sequences."""
        self.one_sequence, self.history = False, ()
        random = np.random.Generator(np.random.PCG64(seed))
        for _ in range(calls):
            random_call(self.model, random, self.packed_ranges, list(self.token_ids))

    @rule(seed=st.integers(0, 2**16), length=st.sampled_from([30, 70, 130, 257, 300]))
    def prefill(self, seed: int, length: int) -> None:
        """Decode a long prompt in one of several sequences."""
        self.one_sequence, self.history = False, ()
        random = np.random.Generator(np.random.PCG64(seed))
        sequence = int(random.integers(self.backend.limits.n_sequences))
        n_held = sum(map(len, self.model.tokens))
        if n_held + length > self.backend.limits.n_ctx:
            self.model.clear()
        length = min(length, self.backend.limits.n_ctx)
        self.model.prefill(sequence, [int(t) for t in random.choice(np.array(self.token_ids), length)])

    @rule()
    def clear(self) -> None:
        self.model.clear()
        self.history, self.one_sequence = (), True

    @invariant()
    def has_recipe_and_namespace(self) -> None:
        if hasattr(self, "backend"):
            assert len(self.backend.recipe) == 16
            assert self.backend.namespace


class _MachineRules(BackendConformance):
    """The rules for the backend of a machine."""

    def __init__(self, machine: type[BackendMachine]) -> None:
        self._machine = machine()
        self.tolerance, self.texts = machine.tolerance, machine.texts
        self.token_ids, self.checks_positions = machine.token_ids, machine.checks_positions
        self.n_calls, self.n_tokens = machine.n_calls, machine.n_tokens

    def make_backend(self) -> Backend:
        return self._machine.make_backend()


# Types of backends that follow the rules, by machine.
_checked_types: WeakKeyDictionary[type[BackendMachine], set[type[Backend]]] = WeakKeyDictionary()
