"""A request of another process that runs here: what each tick adds to its reply, as parts of messages."""

from __future__ import annotations

from typing import Protocol

from erllama._process.protocol import wire_types as w
from erllama._process.protocol.token_message import TokenEntry
from erllama._process.protocol.wire_values import (
    pack_completion,
    pack_error,
    pack_generator,
    pack_piece,
    pack_progress,
)
from erllama.engine import Ticket
from erllama.engine.requests.progress import ReplyProgress
from erllama.engine.requests.ticket import Piece, Waker


class RequestHost(Protocol):
    """Sends what ticks add to requests."""

    def announced(self, request: RunningRequest) -> Waker:
        """List a request, in the model thread. The waker is called after the tick, and calls `request.take`."""
        ...


class RunningRequest:
    """One request of the parent: a `Listener` of its ticket.

    Args:
        id, ticket: the request.
        host: sends what is new.
        n_known: tokens of the reply that the parent has.
        is_read: whether somebody reads the pieces of the reply.

    Attributes:
        id, ticket: the request.
        announced: whether it is listed for the next message.
    """

    def __init__(self, id: int, ticket: Ticket, host: RequestHost, n_known: int, *, is_read: bool) -> None:
        self.id, self.ticket, self.announced = id, ticket, False
        self._host, self._is_read = host, is_read
        self._n_sent = n_known
        self._sent: ReplyProgress | None = None  # in the present process
        ticket.listen(self)

    def announce(self) -> Waker | None:
        """List it for the next message, in the model thread."""
        if self.announced:
            return None
        self.announced = True
        return self._host.announced(self)

    def take(self) -> w.Update | TokenEntry:
        """Return what is new; in the model thread."""
        ticket = self.ticket
        done = ticket.done
        pieces = ticket.take_pieces()
        found, before = None, self._sent
        source = ticket.source
        if source is not None:
            found = self._sent = source.progress(self._n_sent)
            self._n_sent += len(found.tokens)
        are_tokens = found is not None and (not self._is_read or tuple(pieces) == found.tokens)
        if are_tokens and before is not None and not done:
            assert found is not None
            entry = _token_entry(self.id, found, before)
            if entry is not None:
                return entry
        return self._make_update(found, before, None if are_tokens else pieces, done=done)

    def _make_update(
        self, found: ReplyProgress | None, before: ReplyProgress | None, pieces: list[Piece] | None, *, done: bool
    ) -> w.Update:
        progress, shown, ticket = None, None, self.ticket
        if found is not None:
            is_new = before is None or found.sampling_state != before.sampling_state
            progress = pack_progress(found, with_state=is_new)
        if self._is_read and pieces is not None:
            shown = tuple(map(pack_piece, pieces))
        if not done:
            return w.Update(self.id, progress, shown)
        try:
            return w.Update(self.id, progress, shown, completion=pack_completion(ticket.outcome()))
        except BaseException as error:
            return w.Update(self.id, progress, shown, error=pack_error(error))


def _token_entry(id: int, found: ReplyProgress, before: ReplyProgress) -> TokenEntry | None:
    """Return what is new in the short form; None if there is more than one token and its draw."""
    if len(found.tokens) != 1 or found.logprobs or found[3:] != before[3:]:
        return None
    state, last = found.sampling_state, before.sampling_state
    if state is last:
        return TokenEntry(id, found.tokens[0], False, b"")
    if state.position[1:] != last.position[1:] or state.mu is not None:
        return None
    return TokenEntry(id, found.tokens[0], True, pack_generator(state))
