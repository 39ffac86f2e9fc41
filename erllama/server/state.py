"""What all requests of a server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from erllama.server.conduct.rate_limits import RateLimits
from erllama.server.models import ModelPool
from erllama.server.options import ServerOptions
from erllama.server.stored_responses import ResponseStore


@dataclass(slots=True)
class Server:
    """The models, the options and the limits of one server. Used by its event loop.

    Attributes:
        models: the models, by name.
        options: how the server behaves.
        rate_limits: what each key has used.
        responses: the responses that `/v1/responses` keeps.
        signing_key: signs thinking, so that a client cannot send back thoughts that no model had.
        is_stopping: whether the server accepts no further requests.
        claimed_sessions: the sessions of running requests that clients suggested; see `replies.sessions`.
    """

    models: ModelPool
    options: ServerOptions
    signing_key: bytes
    rate_limits: RateLimits = field(default_factory=RateLimits)
    responses: ResponseStore = field(default_factory=ResponseStore)
    is_stopping: bool = False
    claimed_sessions: set[tuple[str, str | None, str]] = field(default_factory=set)
