"""Decides, tick by tick, which requests compute: admission, batches, and preemption.

Used by the model thread alone. A tick is one decode: the token sampled last of every sequence that generates, and
slices of the prompts of the others. Requests are admitted in order of arrival. Requests that run at the same
time have the same set of adapters. A failed request does not affect the others.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import Match, SaveReason
from erllama.engine.adapters import derive_recipe
from erllama.engine.backend import Batch, RecoverableBackend, Threads
from erllama.engine.kv.sequence_kv import SequenceKV
from erllama.engine.metrics import EngineMetrics
from erllama.engine.requests.request import CacheHit
from erllama.engine.requests.ticket import TicketGroup
from erllama.engine.scheduling.batches import BatchBuilder, Part, prefill_budget
from erllama.engine.scheduling.decode_results import DecodeResults, Failure
from erllama.engine.scheduling.decode_run import DecodeRun
from erllama.engine.scheduling.failures import wrap_error
from erllama.engine.scheduling.live_tier import LiveTier
from erllama.engine.scheduling.model_context import ModelContext
from erllama.engine.scheduling.prefix_sharing import PrefixSharing
from erllama.engine.scheduling.sequence import Sequence
from erllama.engine.scheduling.slots import NO_SOURCE, PrefixSource, Slots
from erllama.engine.scheduling.tick_clock import TickClock
from erllama.errors import BackendError, CellsExhausted, DeadlineExceeded, Error

log = logger("erllama.engine")

Phase = Literal["idle", "prefilling", "generating"]


class Scheduler:
    """The running and the waiting requests of one model.

    Args:
        context: what all sequences of the model share.
        n_seq_max: maximum number of requests that run at once.
        prefill_chunk_size: maximum number of tokens of prompts in one tick while replies are generated.
        parked_cells: cells that finished sequences may keep while others compute.
        tier: shows the parked cells to the cache.
        on_end: called with each sequence that ended.
        stopping: returns whether the model is being unloaded: a decode that fails was then aborted on purpose.

    Attributes:
        waiting: requests that are not admitted yet, in order of arrival; preempted ones are at the head.
        running: admitted requests, in the order of admission.
        slots: the context's slots and cells.
        tickets: of these requests. After each tick, the caller wakes their readers.
        clock: measures the ticks; the caller begins and ends each.
        metrics: counts since the model was loaded.
        last_hit: how much of the last prompt was reused.
    """

    def __init__(
        self,
        context: ModelContext,
        *,
        n_seq_max: int,
        prefill_chunk_size: int,
        parked_cells: int,
        tier: LiveTier | None,
        on_end: Callable[[Sequence], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._context = context
        self._backend = context.backend
        self._recoverable = context.backend if isinstance(context.backend, RecoverableBackend) else None
        self._limits = context.backend.limits
        self._threads: Threads | None = getattr(context.backend, "threads", None)
        self._selector = context.selector
        self._tier = tier
        self._n_seq_max = n_seq_max
        self._chunk = prefill_chunk_size
        self._on_end = on_end
        self._stopping = stopping
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.slots = Slots(context.backend, parked_cells, tier)
        self.tickets = TicketGroup()
        self._sharing = PrefixSharing(context, self.slots, self.running)
        self._batches = BatchBuilder(self._limits.n_batch)
        self._run: DecodeRun | None = None
        self._deadline = math.inf  # the earliest deadline of a request, or an earlier time
        self._waits_for_end = False  # whether no waiting request can be admitted before a running one ends
        self._in_flight: SequenceOf[Sequence] = ()  # of a decode that has not returned, or was aborted
        self.clock = TickClock()
        self.metrics = EngineMetrics()
        self._results = DecodeResults(context.backend, self.slots, self.metrics, self._selector)
        self.last_hit: CacheHit | None = None

    @property
    def busy(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self.running or self.waiting)

    @property
    def phase(self) -> Phase:
        """What the running requests do."""
        if not self.running:
            return "idle"
        return "prefilling" if any(s.waiting or s.prefilling for s in self.running) else "generating"

    def add(self, sequence: Sequence) -> None:
        """Add a request to the waiting ones."""
        if not self.waiting:
            self._waits_for_end = False
        self.waiting.append(sequence)
        sequence.ticket.join(self.tickets)
        if sequence.ticket.deadline is not None:
            self._deadline = min(self._deadline, sequence.ticket.deadline)
        if sequence.finish_reason is not None:  # it was resumed after the end of its reply
            self._deadline = -math.inf  # the next tick ends it

    def tick(self) -> bool:
        """Admit requests, decode once, and pass on the results.

        Returns:
            whether the next tick can follow at once. False if there is no request, and if all running ones wait for
            saves of others: the next tick should wait a moment.
        """
        run = self._run
        if run is not None:
            if run.n_ticks < run.max_ticks and not self._is_due():
                self._continue(run)
                return self._run is run or self.busy
            self.end_run()
        self.slots.evict_requested()
        if self.tickets.cancelled or time.perf_counter() >= self._deadline:
            self._end_cancelled_and_late()
        if self._recoverable is not None and self.waiting and not self.running and self._recoverable.memory_lost:
            self._recover(self._recoverable)
        if self.waiting:
            self._admit()
        for sequence in [s for s in self.running if s.slot is None]:
            # A sequence that fails may have preempted the others.
            if sequence in self.running and self._sharing.is_ready(sequence):
                self._start(sequence)
        parts = self._compose()
        if parts:
            self._decode(parts)
            return self.busy
        return self.busy and not any(s.waiting for s in self.running)

    # --- ticks in which nothing but decoding happens

    def _is_due(self) -> bool:
        """Return whether anything but a decode is due."""
        return (
            self.tickets.cancelled
            or (bool(self.waiting) and not self._waits_for_end)
            or (self._tier is not None and bool(self._tier.evicted))
            or (self._deadline < math.inf and time.perf_counter() >= self._deadline)
        )

    def _begin_run(self) -> None:
        """Begin a run, if the next tick can be one of a run."""
        running = self.running
        if self._is_due() or not running or not all([s.is_plain for s in running]):  # noqa: C419 - quicker
            return
        max_ticks = min(*[s.n_plain for s in running], self.slots.cells.free // len(running))
        last = running[0].clock.last_token_at
        if max_ticks > 1 and all(s.clock.last_token_at == last for s in running):
            alone = len(running) == 1 and self.slots.pristine
            ending, selector = self._context.ending_tokens, self._selector
            self._run = DecodeRun(running, self._batches, ending, max_ticks, selector, alone=alone)

    def _continue(self, run: DecodeRun) -> None:
        """Run one tick of a run. Ends the run if a reply ends, or a request fails."""
        sequences, n = run.sequences, len(run.sequences)
        self._in_flight = sequences
        # Adapters and threads are those of the tick before the run, in which the same sequences decoded.
        clock = self.clock
        clock.rows = n
        try:
            began = time.monotonic()
            logits = self._backend.decode(run.batch)
            clock.record(n, time.monotonic() - began)
            if logits is not run.logits:
                self._check_shape(logits, n)
                run.logits = logits
        except BaseException as error:
            self._handle_failed_decode(error, sequences)
            return
        self._in_flight = ()
        now = time.perf_counter()
        if self._threads is not None and not self._threads.as_in_recipe:
            run.alone = False
        metrics = self.metrics
        metrics.ticks += 1
        metrics.decoded_tokens += n
        sampled = run.sampler.sample(logits, run.contexts)
        seconds = now - run.last_token_at
        if run.append(sampled, now):
            metrics.between_tokens.observe(seconds, n)
            return
        alone = run.alone
        self.end_run()
        self._fail_each(self._results.process_sampled(sequences, sampled, logits, now, alone))
        self._conclude(sequences)

    def end_run(self) -> None:
        """End the run, if there is one: the sequences and the cells are up to date then.

        The caller does so before it uses them between two ticks.
        """
        run, self._run = self._run, None
        if run is not None:
            run.end(self.slots.cells)

    # --- admission

    def _end_cancelled_and_late(self) -> None:
        """End the requests that were cancelled, exceeded their deadline, or were resumed after their end."""
        self.tickets.cancelled = False  # before the tickets are checked: they may be cancelled meanwhile
        self._deadline = -math.inf  # if the backend fails here, the next tick checks the others
        earliest = math.inf
        now = time.perf_counter()
        for sequence in [*self.running, *self.waiting]:
            ticket = sequence.ticket
            if ticket.cancelled and sequence.finish_reason is None:
                sequence.finish_reason = "cancelled"
            if sequence.finish_reason is not None:
                self._finish(sequence)
            elif ticket.deadline is not None and now >= ticket.deadline:
                timeout = ticket.request.options.timeout
                self.fail(sequence, DeadlineExceeded(f"the reply was not done within timeout={timeout} seconds"))
            elif ticket.deadline is not None:
                earliest = min(earliest, ticket.deadline)
        self._deadline = earliest

    def _admit(self) -> None:
        """Admit waiting requests, in order, while they fit."""
        generating = any(not s.waiting and not s.prefilling for s in self.running)
        n_before = self.metrics.cached_tokens
        n_prompts = 0
        while self.waiting:
            first = self.waiting[0]
            self._waits_for_end = not self._sharing.may_run(first, self._n_seq_max)
            # While replies are generated, no more than this tick can compute: restoring takes its time, too.
            if self._waits_for_end or (
                generating and (n_prompts >= self._chunk or self.metrics.cached_tokens > n_before)
            ):
                return
            self.waiting.popleft()
            self.running.append(first)
            self._start(first)
            n_prompts += first.n_tokens - first.n_computed

    def _start(self, sequence: Sequence) -> None:
        """Bring an admitted sequence into the context, or make it wait for another sequence or for a save."""
        sequence.leader, sequence.n_from_leader = None, 0
        prefix_cache, parent_key = self._context.prefix_cache, sequence.options.parent_key
        if parent_key is not None and not sequence.parent_deadline:
            # The wait is spread over ticks, so that other replies continue meanwhile.
            wait_ms = prefix_cache.policy.session_resume_wait_ms
            sequence.parent_deadline = time.perf_counter() + wait_ms / 1000
            if not self._sharing.is_ready(sequence):
                return
        match = prefix_cache.find(sequence.namespace, sequence.reusable, parent_key)
        try:
            source = self._sharing.find_source(sequence)
            n_available = max(source.n, match.n_tokens if match is not None else 0)
            leader = self._sharing.find_leader(sequence, n_available)
            if leader.sequence is not None:
                sequence.leader, sequence.n_from_leader = leader
                return
            if sequence.fetch is None:
                sequence.fetch = prefix_cache.fetch(match, source.n)
                if sequence.fetch is not None and not sequence.fetch.done:
                    return
            self._enter_context(sequence, match, source)
        except BaseException as error:
            self._fail_and_restart([sequence], wrap_error(error))
        finally:
            if match is not None:
                match.release()

    def _enter_context(self, sequence: Sequence, match: Match | None, source: PrefixSource) -> None:
        """Allocate a slot with the cells of `source`, and restore the tokens that the cache has beyond them."""
        began = time.perf_counter()
        slots = self.slots
        n_stored = match.n_tokens if match is not None else 0
        if not self._limits.can_trim and n_stored > source.n:
            source = NO_SOURCE  # such memory cannot be restored from the middle of a stored prefix
        if sequence.options.reproducible:
            slots.clear()
        # First those that have to go anyway: if no other sequence stays, the context is cleared, and the cells of
        # this one lie in order.
        slots.trim_parked(keep=source.sequence)
        slot, provenance = slots.allocate(sequence, source)
        if n_stored > source.n:  # whole blocks are restored, and then cut
            slots.make_room(n_stored - source.n + self._context.prefix_cache.slicing.block_size)
        recipe = derive_recipe(self._backend.recipe, sequence.adapters)
        kv = SequenceKV(self._context.prefix_cache, slot, sequence.namespace, sequence.n_prompt, recipe)
        restored = kv.restore(
            sequence.buffer[: len(sequence.reusable) + 1],
            match,
            reproducible=sequence.options.reproducible,
            n_shared=source.n,
            room=slots.cells.free,
            provenance=provenance,
        )
        hit, n_shared = restored
        slots.cells.cut(slot, n_shared)
        slots.cells.extend(slot, hit.tokens - n_shared)
        if sequence.hit is None:
            self.last_hit = hit
            kv.count_request(hit, sequence.options.parent_key, match)
            self.metrics.prompt_tokens += sequence.n_prompt
            self.metrics.shared_tokens += n_shared
            self.metrics.cached_tokens += hit.tokens - n_shared
        sequence.enter_context(slot, kv, hit, n_stored, began)
        slots.trim_parked()

    # --- the batch

    def _compose(self) -> list[Part]:
        """Return the rows of this tick. Preempts sequences until the rows fit the cells."""
        while True:
            inside = [s for s in self.running if s.slot is not None]
            rows = [Part(s, s.n_computed, s.n_computed + 1) for s in inside if not s.prefilling]
            if self.slots.make_room(len(rows)):
                if len(rows) == len(inside) > 0:
                    return self._results.add_drafts(rows)
                parts = rows + self._prefill_slices(inside, len(rows))
                if parts or not inside:
                    return parts
            if len(inside) > 1:
                self._preempt(self.running[-1])
            elif not self._restart_alone(inside[0]):
                self.fail(
                    inside[0],
                    CellsExhausted(
                        f"{inside[0].n_computed} of {inside[0].n_tokens} tokens fit the backend's cells, which are "
                        f"fewer than its n_ctx of {self._limits.n_ctx}"
                    ),
                )

    def _prefill_slices(self, inside: list[Sequence], n_rows: int) -> list[Part]:
        """Return slices of prompts, in the order of admission, with as many tokens as fit the tick."""
        remaining = sum([s.n_tokens - s.n_computed for s in inside if s.prefilling])
        token_budget = prefill_budget(self._limits, self._chunk, n_rows, remaining)
        parts = []
        n_cells = n_rows
        for sequence in inside:
            if token_budget <= 0:
                break
            if sequence.prefilling:
                start = sequence.n_computed
                end = sequence.next_slice_end(token_budget, len(inside) == 1)
                if not self.slots.make_room(n_cells + end - start):
                    end = start + self.slots.cells.free - n_cells
                    if end <= start:
                        break
                    end = sequence.next_slice_end(end - start, len(inside) == 1)
                parts.append(Part(sequence, start, end))
                n_cells += end - start
                token_budget -= end - start
        return parts

    # --- the decode

    def _decode(self, parts: list[Part]) -> None:
        """Decode the parts, and pass the logits to their sequences."""
        alone = len(parts) == 1 and self.slots.pristine
        batch, n_output = self._batches.build(parts)
        sequences = [part.sequence for part in parts]
        began = time.perf_counter()
        logits = self._compute(batch, sequences, n_output)
        if logits is None:
            return
        alone = alone and (self._threads is None or self._threads.as_in_recipe)
        now = time.perf_counter()
        n_prefilled = self._results.count(parts, len(batch.tokens), now - began)
        if 2 * n_prefilled > len(batch.tokens):
            self._context.prefix_cache.prefill_cost.record(n_prefilled, now - began)
        self._fail_each(self._results.process(parts, logits, now, alone))
        self._conclude(sequences)

    def _compute(self, batch: Batch, sequences: SequenceOf[Sequence], n_output: int) -> NDArray[np.float32] | None:
        """Return the logits of a batch, shape (n_output, n_vocab); None if the decode failed, which is handled."""
        self._in_flight = sequences
        if self._threads is not None:
            self._threads.fixed = sequences[0].options.reproducible
        try:
            self._context.adapters.use(sequences[0].adapters)
            n_rows = self.clock.rows = len(batch.tokens)
            began = time.monotonic()
            logits = self._backend.decode(batch)
            self.clock.record(n_rows, time.monotonic() - began)
            self._check_shape(logits, n_output)
        except BaseException as error:
            self._handle_failed_decode(error, sequences)
            return None
        self._in_flight = ()
        return logits

    def _check_shape(self, logits: NDArray[np.float32], n_output: int) -> None:
        if logits.shape != (n_output, self._limits.n_vocab):
            raise BackendError(f"the backend returned logits of shape {logits.shape}")

    def _conclude(self, sequences: SequenceOf[Sequence]) -> None:
        """Notify the readers of decoded sequences, save what is due, and end the requests that are done."""
        for sequence in sequences:
            # All together, and last: a woken reader needs the interpreter, which is free during a decode.
            sequence.ticket.notify()
        for sequence in sequences:
            if sequence.slot is not None:
                sequence.save_due()
                if sequence.finish_reason is not None:
                    self.tickets.wake()  # before saving, which takes its time
                    self._finish(sequence)
        self._begin_run()

    # --- the end of a request

    def _finish(self, sequence: Sequence) -> None:
        """End a request with a reply."""
        try:
            if sequence.slot is not None:
                sequence.save(SaveReason.FINISH)
            completion = sequence.completion()
        except BaseException as error:
            self.fail(sequence, wrap_error(error))
            return
        if sequence.slot is not None:
            self.slots.park(sequence)
        # The caller is notified first, in case the backend fails when it drops parked sequences.
        self._remove(sequence)
        self.metrics.count_finished(completion.finish_reason)
        sequence.ticket.finish(completion)
        if self.running:
            self.slots.trim_parked()

    def _fail_each(self, failures: list[Failure]) -> None:
        for sequence, error in failures:
            self.fail(sequence, wrap_error(error))

    def fail(self, sequence: Sequence, error: Error) -> None:
        """End a request with an error."""
        slot = sequence.slot
        self._remove(sequence)
        self.metrics.count_failed(error)
        sequence.ticket.fail(error)
        if slot is not None:
            self.slots.release(slot)

    def _remove(self, sequence: Sequence) -> None:
        self._waits_for_end = False
        self._leave_context(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._on_end(sequence)

    def _leave_context(self, sequence: Sequence) -> None:
        sequence.leave_context()
        for other in self.running:
            if other.leader is sequence:
                other.leader, other.n_from_leader = None, 0

    # --- preemption and failures

    def _preempt(self, sequence: Sequence) -> None:
        """Save the KV of a running sequence, and move it to the head of the queue."""
        if sequence.slot is not None:
            sequence.save(SaveReason.EVICT)
            self.slots.release(sequence.slot)
            # Each preemption doubles the room it needs to be admitted again: restoring has a cost, too.
            sequence.headroom = 2 * sequence.headroom
            self.metrics.preempted += 1
        self._leave_context(sequence)
        sequence.ticket.flush()
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self._waits_for_end = False

    def _handle_failed_decode(self, error: BaseException, sequences: SequenceOf[Sequence]) -> None:
        if isinstance(error, CellsExhausted):
            self._lower_capacity(error)
        elif not self._stopping():
            self._fail_and_restart(sequences, wrap_error(error))

    def _lower_capacity(self, error: CellsExhausted) -> None:
        """Lower the capacity to the cells in use: the backend has fewer than counted. The next tick makes room."""
        self._in_flight = ()
        self.end_run()
        log.info("%s: using only the %d cells now in use, until the context is empty", error, self.slots.cells.used)
        self.slots.cells.capacity = self.slots.cells.used

    def _restart_alone(self, sequence: Sequence) -> bool:
        """Preempt all, and clear the context, after the backend ran out of cells too early.

        Returns:
            False if that was tried before, at the same length of the sequence.
        """
        if sequence.n_at_exhaustion == sequence.n_tokens:
            return False
        sequence.n_at_exhaustion = sequence.n_tokens
        for other in self.running[::-1]:
            self._preempt(other)
        self.slots.clear()
        return True

    def _fail_and_restart(self, sequences: SequenceOf[Sequence], error: Error) -> None:
        """End some requests after a failed decode, clear the context, and queue all others again."""
        self.end_run()
        for sequence in self.running:
            self._leave_context(sequence)
        self._in_flight = ()
        self.slots.clear()
        for sequence in sequences:
            self.fail(sequence, error)
        for sequence in self.running:
            sequence.ticket.flush()
        self.waiting.extendleft(self.running[::-1])
        self.running.clear()
        self._waits_for_end = False

    def _recover(self, backend: RecoverableBackend) -> None:
        """Make a backend usable that has lost its KV. If that fails, end all waiting requests."""
        try:
            backend.recover()
            self.slots.clear()
        except BaseException as error:
            failure = wrap_error(error)
            for sequence in [*self.waiting]:
                self.fail(sequence, failure)

    def fail_all(self, error: Error) -> None:
        """End all running requests with an error, after a bug in the engine."""
        self._fail_and_restart(list(self.running), error)

    # --- requests of other threads, run between two ticks

    def warm_up(self) -> None:
        """Decode one arbitrary token and clear it, in this thread: the backend allocates threads and memory."""
        zero = np.zeros(1, np.int32)
        began = time.monotonic()
        self._backend.decode(Batch(zero, zero, zero, np.ones(1, np.int8)))
        self.clock.record(1, time.monotonic() - began)
        self._backend.clear()

    def evict(self) -> None:
        """Save the KV of the running sequences, and evict the parked ones."""
        for sequence in self.running:
            if sequence.slot is not None:
                sequence.save(SaveReason.EVICT)
        try:
            self.slots.evict_parked()
        except BaseException as error:
            # The state of the context is unknown now: clear it, and queue the running requests again.
            self._fail_and_restart([], wrap_error(error))

    def shut_down(self, error: Error) -> bool:
        """End all requests with an error, and save their KV. Returns whether any was saved."""
        self.end_run()
        saved = False
        for sequence in [*self.running, *self.waiting]:
            try:
                if sequence.slot is not None and (sequence not in self._in_flight or sequence.recover()):
                    sequence.save(SaveReason.SHUTDOWN)
                    saved = True
            except BaseException:
                log.warning("an interrupted request could not be saved", exc_info=True)
            self._remove(sequence)
            self.metrics.count_failed(error)
            sequence.ticket.fail(error)
        return saved
