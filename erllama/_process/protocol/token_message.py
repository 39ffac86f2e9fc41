"""The short message of a tick that adds one token to each of some replies, and changes nothing else.

Most ticks do. Their message is packed by hand, because it is sent and read between two decodes, so that its time is
added to every token. The body begins with a byte that no other message begins with.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from erllama._process.protocol.frames import ProtocolError

# The only byte that MessagePack never uses.
MARK = 0xC1
_MARK = bytes([MARK])
# The request, its token, whether the sampler's state changed, and the part of the state that a draw changes.
_ENTRY = struct.Struct("<QI?16s")


class TokenEntry(NamedTuple):
    """The new token of one reply.

    Attributes:
        id: the request.
        token: the token's id.
        drawn: whether `state` has a value: the token was drawn, and the sampler's state changed.
        state: the number of the sampler's generator after it, as in `WireSamplingState`.
    """

    id: int
    token: int
    drawn: bool
    state: bytes


def encode_tokens(entries: Sequence[TokenEntry]) -> bytes:
    """Return the body of the message."""
    pack = _ENTRY.pack
    return _MARK + b"".join([pack(*entry) for entry in entries])


def decode_tokens(body: bytes) -> list[TokenEntry]:
    """Return the entries of a body that begins with `MARK`.

    Raises:
        ProtocolError: the body is cut short.
    """
    if (len(body) - 1) % _ENTRY.size:
        raise ProtocolError(f"a message of tokens has {len(body)} bytes, which are no whole entries")
    return [TokenEntry(*entry) for entry in _ENTRY.iter_unpack(memoryview(body)[1:])]
