"""Decides, tick by tick, who computes: admission, sharing, batches, and who gives way when cells run out.

Used by the model thread alone. Each tick is one decode, over the tokens drawn
last of all sequences that generate, and slices of the prompts of those that do
not yet. Requests enter first come, first served; those that run at one time have one set of
adapters. A request that fails, fails alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import Match, SaveReason
from erllama.engine.adapters import recipe
from erllama.engine.backend import Batch
from erllama.engine.kv.sequence_kv import SequenceKV
from erllama.engine.metrics import EngineMetrics
from erllama.engine.requests.request import CacheHit
from erllama.engine.scheduling.batches import BatchBuilder, Part
from erllama.engine.scheduling.live_tier import LiveTier
from erllama.engine.scheduling.model_context import ModelContext
from erllama.engine.scheduling.sequence import HEADROOM, Sequence
from erllama.engine.scheduling.slots import Parked, Slots, common_prefix
from erllama.engine.speculation import DecodeCosts
from erllama.errors import BackendError, CellsExhausted, DeadlineExceeded, Error

log = logger("erllama.engine")

Phase = Literal["idle", "prefilling", "generating"]

# Prefixes shorter than this are computed again rather than waited for: less than a tick of one's own costs.
_WORTH_WAITING = 16


class Scheduler:
    """The running and the waiting requests of one model.

    Args:
        shared: the cache, the backend, and how it computes.
        n_seq_max: most requests that run at once.
        prefill_chunk_size: most tokens of prompts in one tick beside replies that are being written.
        parked_cells: cells that finished sequences may keep while others compute.
        tier: shows the cache what is parked.
        on_end: called with each request that ended.
        stopping: whether the model is being unloaded: a decode that fails was ended on purpose.

    Attributes:
        waiting: who is not admitted yet, first come first; those sent back are at its head.
        running: who is admitted, in that order.
    """

    def __init__(
        self,
        shared: ModelContext,
        *,
        n_seq_max: int,
        prefill_chunk_size: int,
        parked_cells: int,
        tier: LiveTier | None,
        on_end: Callable[[Sequence], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._shared = shared
        self._backend = shared.backend
        self._limits = shared.backend.limits
        self._n_seq_max = n_seq_max
        self._chunk = prefill_chunk_size
        self._live = Slots(shared.backend, parked_cells, tier)
        self._batches = BatchBuilder(self._limits.n_batch)
        self._on_end = on_end
        self._stopping = stopping
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._in_flight: list[Part] = []  # given to a decode that has not come back, or was ended
        self._costs = DecodeCosts()
        self._speculating = False  # a request of the last tick may compute ahead
        self.metrics = EngineMetrics()
        self.last_hit: CacheHit | None = None

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def phase(self) -> Phase:
        if not self.running:
            return "idle"
        return "prefilling" if any(s.waiting or s.prefilling for s in self.running) else "generating"

    @property
    def live(self) -> Slots:
        return self._live

    def tick(self) -> bool:
        """Admit who can be, decode once, and pass on what came of it.

        Returns:
            False where everybody waits for something outside: it is too early for another.
        """
        self._live.give_up()
        self._sweep()
        if self.waiting:
            self._admit()
        for sequence in [s for s in self.running if s.number is None]:
            # One that fails may have sent the others back.
            if sequence in self.running and self._ready(sequence):
                self._start(sequence)
        parts = self._compose()
        if parts:
            self._decode(parts)
            return True
        return not any(s.waiting for s in self.running)

    # --- who enters

    def _sweep(self) -> None:
        """End what was cancelled, or is late."""
        now = time.perf_counter()
        for sequence in [*self.running, *self.waiting]:
            ticket = sequence.ticket
            if ticket.cancelled:
                sequence.finish_reason = "cancelled"
                self._finish(sequence)
            elif ticket.deadline is not None and now >= ticket.deadline:
                timeout = ticket.request.options.timeout
                self.fail(sequence, DeadlineExceeded(f"the reply was not done within timeout={timeout} seconds"))

    def _admit(self) -> None:
        # Beside replies that are being written, one a tick: restoring takes its time, too.
        generating = any(not s.waiting and not s.prefilling for s in self.running)
        for _ in range(1 if generating else self._n_seq_max):
            if not self.waiting or len(self.running) >= self._n_seq_max:
                return
            first = self.waiting[0]
            if self.running and (first.options.reproducible or self.running[0].options.reproducible):
                return  # such a request has the context to itself
            if self.running and first.adapters != self.running[0].adapters:
                return  # a decode has one set of adapters: who has another waits for those before, as all behind do
            if self.running and not self._has_room(first):
                return
            self.waiting.popleft()
            self.running.append(first)
            self._start(first)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether its prompt, those of all who run, and a little of their replies fit the cells."""
        source, shared = self._live.longest(sequence, self.running)
        if isinstance(source, Parked):
            shared = 0  # its cells count as room
        _, fork = self._leader_of(sequence, shared)
        needed = sequence.n_known - max(shared, fork) + min(sequence.headroom, sequence.growth)
        for other in self.running:
            needed += other.n_known - max(other.n_held, other.fork if other.waiting else 0)
            needed += min(HEADROOM, other.growth)
        return needed <= self._live.room

    def _start(self, sequence: Sequence) -> None:
        """Bring an admitted sequence into the context, or note whom it waits for."""
        sequence.leader, sequence.fork = None, 0
        parent_key = sequence.options.parent_key
        if parent_key is not None and not sequence.waits_until:
            # Tick by tick, so that others' replies go on meanwhile.
            sequence.waits_until = time.perf_counter() + self._shared.policy.session_resume_wait_ms / 1000
            if not self._ready(sequence):
                return
        match = self._shared.find(sequence.namespace, sequence.reusable, parent_key)
        try:
            shares = not sequence.options.reproducible and self._shared.weights.intact()
            source, n_live = self._live.longest(sequence, self.running) if shares else (None, 0)
            warm = max(n_live, match.n_tokens if match is not None else 0)
            leader, fork = self._leader_of(sequence, warm)
            if leader is not None:
                sequence.leader, sequence.fork = leader, fork
                return
            self._place(sequence, match, source, n_live)
        except BaseException as error:
            self._failed([sequence], typed(error))
        finally:
            if match is not None:
                match.release()

    def _ready(self, sequence: Sequence) -> bool:
        """Whether what an admitted sequence waited for has come, or will not come any more."""
        leader = sequence.leader
        if leader is not None:
            return leader.n_held >= sequence.fork or leader not in self.running
        key = sequence.options.parent_key
        late = time.perf_counter() >= sequence.waits_until
        return key is None or late or not self._shared.awaits(key)

    def _leader_of(self, sequence: Sequence, warm: int) -> tuple[Sequence | None, int]:
        """Who of those admitted before is about to compute more of its prefix than can be had now, and how much."""
        leader, fork = None, warm + _WORTH_WAITING - 1
        if sequence.options.reproducible or not self._shared.weights.intact():
            return None, 0
        for other in self.running:
            if other is sequence:
                break
            if other.namespace != sequence.namespace or other.n_held >= other.n_known:
                continue
            n = common_prefix(other.known, sequence.reusable)
            if not self._limits.can_trim:
                n -= n % self._shared.slicing.block_size  # it gets what is packed at blocks' ends
            if n > max(fork, other.n_held):
                leader, fork = other, n
        return (leader, fork) if leader is not None else (None, 0)

    def _place(
        self, sequence: Sequence, match: Match | None, source: Sequence | Parked | None, n_live: int
    ) -> None:
        began = time.perf_counter()
        live = self._live
        n_stored = match.n_tokens if match is not None else 0
        if not self._limits.can_trim and n_stored > n_live:
            source, n_live = None, 0  # it could not go on from the middle of what is stored
        if sequence.options.reproducible:
            live.clear()
        number, as_computed = live.take_in(sequence, source, n_live)
        if n_stored > n_live:  # whole blocks are restored, and then cut
            live.make_room(n_stored - n_live + self._shared.slicing.block_size)
        how = recipe(self._backend.recipe, sequence.adapters)
        warmth = SequenceKV(self._shared, number, sequence.namespace, sequence.n_prompt, how)
        restored = warmth.restore(
            sequence.tokens[: len(sequence.reusable) + 1],
            match,
            reproducible=sequence.options.reproducible,
            n_shared=n_live,
            room=live.cells.free,
            as_computed=as_computed,
        )
        live.cells.cut(number, restored.n_shared)
        live.cells.extend(number, restored.hit.tokens - restored.n_shared)
        if sequence.hit is None:
            self.last_hit = restored.hit
            warmth.count(restored.hit, sequence.options.parent_key, match)
            self.metrics.prompt_tokens += sequence.n_prompt
            self.metrics.shared_tokens += restored.n_shared
            self.metrics.cached_tokens += restored.hit.tokens - restored.n_shared
        sequence.enter(number, warmth, restored.hit.tokens, restored.hit, began)
        live.thin_out()

    # --- what is computed

    def _compose(self) -> list[Part]:
        """The rows of this tick."""
        while True:
            inside = [s for s in self.running if s.number is not None]
            rows = [Part(s, s.n_held, s.n_held + 1) for s in inside if not s.prefilling]
            if self._live.make_room(len(rows)):
                if len(rows) == len(inside) > 0:
                    return self._with_drafts(rows)
                parts = rows + self._slices(inside, len(rows))
                if parts or not inside:
                    return parts
            if len(inside) > 1:
                self._send_back(self.running[-1])
            elif not self._tries_again(inside[0]):
                self.fail(
                    inside[0],
                    CellsExhausted(
                        f"{inside[0].n_held} of {inside[0].n_known} tokens fit the cells that the backend has, "
                        f"of the {self._limits.n_ctx} that it said it has"
                    ),
                )

    def _with_drafts(self, rows: list[Part]) -> list[Part]:
        """Where only replies are written: rows of what is likely to come, in cells that nobody else wants."""
        self._speculating = any([part.sequence.speculates for part in rows])  # noqa: C419 - quicker
        if not self._speculating:
            return rows
        spare = min(self._limits.n_batch, self._live.cells.free) - len(rows)
        parts = []
        for part in rows:
            n = part.sequence.draft(spare, len(rows), self._costs) if part.sequence.speculates else 0
            parts.append(part._replace(end=part.end + n))
            spare -= n
        return parts

    def _tries_again(self, sequence: Sequence) -> bool:
        """Where the backend ran out of cells too early: start anew in an empty context; once at one place."""
        if sequence.ran_out_at == sequence.n_known:
            return False
        sequence.ran_out_at = sequence.n_known
        for other in self.running[::-1]:
            self._send_back(other)
        self._live.clear()
        return True

    def _slices(self, inside: list[Sequence], n_rows: int) -> list[Part]:
        """Slices of prompts, in the order of admission: as many tokens as fit the tick."""
        most = self._chunk if n_rows else max(self._chunk, self._limits.n_ubatch)
        most = min(most, self._limits.n_batch - n_rows)
        parts = []
        taken = n_rows
        for sequence in inside:
            if most <= 0:
                break
            if sequence.prefilling:
                start = sequence.n_held
                end = sequence.next_end(most, len(inside) == 1)
                if not self._live.make_room(taken + end - start):
                    end = start + self._live.cells.free - taken
                    if end <= start:
                        break
                    end = sequence.next_end(end - start, len(inside) == 1)
                parts.append(Part(sequence, start, end))
                taken += end - start
                most -= end - start
        return parts

    def _decode(self, parts: list[Part]) -> None:
        alone = len(parts) == 1 and self._live.pristine
        batch, n_wanted = self._batches.build(parts)
        self._in_flight = parts
        began = time.perf_counter()
        try:
            self._shared.adapters.use(parts[0].sequence.adapters)
            logits = self._backend.decode(batch)
            if logits.shape != (n_wanted, self._limits.n_vocab):
                raise BackendError(f"the backend gave logits of shape {logits.shape}")
        except CellsExhausted as error:
            self._ran_out(error)
            return
        except BaseException as error:
            if not self._stopping():
                self._failed([part.sequence for part in parts], typed(error))
            return
        self._in_flight = []
        now = time.perf_counter()
        rows = sum([not sequence.prefilling for sequence, _, _ in parts])
        drafts = sum([end - sequence.n_known for sequence, _, end in parts if end > sequence.n_known])
        self.metrics.ticks += 1
        self.metrics.decoded_tokens += rows
        self.metrics.drafted_tokens += drafts
        self.metrics.prefilled_tokens += len(batch.tokens) - rows - drafts
        if self._speculating and rows == len(parts):
            self._costs.measured(len(batch.tokens), now - began)
        row = 0
        for sequence, start, end in parts:
            assert sequence.number is not None
            self._live.cells.extend(sequence.number, end - start)
            wanted = sequence.wanted(end)
            try:
                if end > sequence.n_known:
                    self._verify(sequence, end, logits[row : row + len(wanted)], now, alone)
                else:
                    sequence.decoded(end, alone)
                    if wanted:
                        sequence.answer(logits[row : row + len(wanted)], now, self.metrics)
            except BaseException as error:
                self.fail(sequence, typed(error))
            row += len(wanted)
        for sequence, _, _ in parts:
            # All at once, and last: whoever is woken wants the interpreter, which is free during a decode.
            sequence.ticket.tell()
        for sequence, _, _ in parts:
            if sequence.number is not None:
                sequence.keep()
                if sequence.finish_reason is not None:
                    self._finish(sequence)

    def _verify(self, sequence: Sequence, end: int, logits: NDArray[np.float32], now: float, alone: bool) -> None:
        """Keep what came true of a draft."""
        n_held, n_before = sequence.n_held, sequence.n_known
        sequence.verify(end, logits, now, self.metrics)
        if alone:
            sequence.warmth.placed(n_held, sequence.n_held)
        self.metrics.accepted_tokens += sequence.n_held - n_before
        if sequence.n_held < end:
            assert sequence.number is not None
            self._backend.cut(sequence.number, sequence.n_held)
            self._live.cells.cut(sequence.number, sequence.n_held)

    # --- who leaves

    def _finish(self, sequence: Sequence) -> None:
        """A request ends with a reply."""
        try:
            if sequence.number is not None:
                sequence.save(SaveReason.FINISH)
            completion = sequence.completion()
        except BaseException as error:
            self.fail(sequence, typed(error))
            return
        if sequence.number is not None:
            self._live.park(sequence)
        # Who waits is told first, whatever the backend does when it is asked to drop something.
        self._gone(sequence)
        self.metrics.ended(completion.finish_reason)
        sequence.ticket.finish(completion)
        if self.running:
            self._live.thin_out()

    def fail(self, sequence: Sequence, error: Error) -> None:
        """A request ends with an error."""
        number = sequence.number
        self._gone(sequence)
        self.metrics.went_wrong(error)
        sequence.ticket.fail(error)
        if number is not None:
            self._live.release(number)

    def _gone(self, sequence: Sequence) -> None:
        self._leave(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._on_end(sequence)

    def _leave(self, sequence: Sequence) -> None:
        sequence.leave()
        for other in self.running:
            if other.leader is sequence:
                other.leader, other.fork = None, 0

    def _send_back(self, sequence: Sequence) -> None:
        """Save what a running sequence holds, and put it at the head of those that wait."""
        if sequence.number is not None:
            sequence.save(SaveReason.EVICT)
            self._live.release(sequence.number)
            # Each time it asks for more room before it comes back: coming back costs, too.
            sequence.headroom = 2 * sequence.headroom
            self.metrics.preempted += 1
        self._leave(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _ran_out(self, error: CellsExhausted) -> None:
        """The backend has fewer cells than was counted; nothing was computed. The next tick makes room."""
        log.info("%s: counting on the %d cells in use, until the context is empty", error, self._live.cells.used)
        self._in_flight = []
        self._live.cells.capacity = self._live.cells.used

    def _failed(self, sequences: list[Sequence], error: Error) -> None:
        """A decode failed: its requests end, the context is made anew, and whoever else was in it comes back."""
        for sequence in self.running:
            self._leave(sequence)
        self._in_flight = []
        self._live.clear()
        for sequence in sequences:
            self.fail(sequence, error)
        self.waiting.extendleft(self.running[::-1])
        self.running.clear()

    def fail_all(self, error: Error) -> None:
        """What should never happen did: everything that runs ends with an error."""
        self._failed(list(self.running), error)

    # --- what others ask for, between two ticks

    def warm_up(self) -> None:
        """Decode any one token and forget it, in this thread: the backend's threads and memory are its own."""
        zero = np.zeros(1, np.int32)
        self._backend.decode(Batch(zero, zero, zero, np.ones(1, np.int8)))
        self._backend.clear()

    def evict(self) -> None:
        """Save what is in the context, and drop what nobody uses."""
        for sequence in self.running:
            if sequence.number is not None:
                sequence.save(SaveReason.EVICT)
        try:
            self._live.drop_all_parked()
        except BaseException as error:
            # Nobody knows what the context holds now: it is made anew, and whoever was in it comes back.
            self._failed([], typed(error))

    def shut_down(self, error: Error) -> bool:
        """End everything, keeping what was computed; whether anything was saved."""
        saved = False
        in_flight = [part.sequence for part in self._in_flight]
        for sequence in [*self.running, *self.waiting]:
            try:
                if sequence.number is not None and (sequence not in in_flight or sequence.recover()):
                    sequence.save(SaveReason.SHUTDOWN)
                    saved = True
            except BaseException:
                log.warning("an interrupted request could not be saved", exc_info=True)
            self._gone(sequence)
            self.metrics.went_wrong(error)
            sequence.ticket.fail(error)
        return saved


def typed(error: BaseException) -> Error:
    """Return an error of this library for whatever was raised in the model thread, SystemExit included.

    No interrupt is meant for that thread, and no request may end it.
    """
    if isinstance(error, Error):
        return error
    log.error("a request failed unexpectedly", exc_info=error)
    failure = BackendError(f"the request failed unexpectedly: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
