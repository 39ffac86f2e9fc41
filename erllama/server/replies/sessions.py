"""Sessions that a client suggests, such as by OpenAI's `prompt_cache_key`.

A session of the engine takes one request at a time and refuses a second one. A client that sends the same
`prompt_cache_key` with concurrent requests does not expect an error. So the first of them has the session, and the
others run without it: their cells are released a little earlier, and their replies are the same.
"""

from __future__ import annotations

from erllama.server.endpoints import Call
from erllama.server.models import ServedModel

# Keeps these sessions apart from those that clients name by `session_id`.
_PREFIX = "prompt_cache_key "


class SessionHint:
    """The session of one request, from `claim` to `release`.

    Attributes:
        session_id: the session's name.
    """

    def __init__(self, claimed: set[tuple[str, str | None, str]], key: tuple[str, str | None, str]) -> None:
        self._claimed, self._key = claimed, key
        self.session_id = key[2]
        self._is_released = False
        claimed.add(key)

    @classmethod
    def claim(cls, call: Call, served: ServedModel, name: str, cache_salt: str | None) -> SessionHint | None:
        """Return the session of a name; None while another request has it."""
        key = (served.name, cache_salt, _PREFIX + name)
        return None if key in call.server.claimed_sessions else cls(call.server.claimed_sessions, key)

    def release(self) -> None:
        """Make the session available to other requests. Idempotent."""
        if not self._is_released:
            self._is_released = True
            self._claimed.discard(self._key)

    def __del__(self) -> None:
        self.release()  # the client left before its stream began
