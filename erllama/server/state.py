"""What all requests of a server share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from erllama.server.conduct.metrics import ModelLoad, ServerMetrics
from erllama.server.conduct.prefix_watch import PrefixWatch
from erllama.server.conduct.rate_limits import RateLimits
from erllama.server.models import ModelPool
from erllama.server.options import ServerOptions
from erllama.server.pins import ClientPins
from erllama.server.stored_responses import ResponseStore


@dataclass(slots=True)
class Server:
    """The models, the options and the limits of one server. Used by its event loop.

    Attributes:
        models: the models, by name.
        options: how the server behaves.
        rate_limits: what each key has used.
        responses: the responses that `/v1/responses` keeps.
        signing_key: signs thinking, so that thoughts which a client changed are found when it sends them back.
        prefixes: recent prompts, to find conversations whose prefix changes.
        is_stopping: whether the server accepts no further requests.
        claimed_sessions: the sessions of running requests that clients suggested; see `replies.sessions`.
        client_pins: pins the prefixes that clients ask for.
        metrics: what it has done. `metrics.registry` is for `GET /metrics`.
    """

    models: ModelPool
    options: ServerOptions
    signing_key: bytes
    rate_limits: RateLimits = field(default_factory=RateLimits)
    prefixes: PrefixWatch = field(default_factory=PrefixWatch)
    responses: ResponseStore = field(default_factory=ResponseStore)
    is_stopping: bool = False
    claimed_sessions: set[tuple[str, str | None, str]] = field(default_factory=set)
    client_pins: ClientPins = field(default_factory=ClientPins)
    metrics: ServerMetrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(self._load)

    def _load(self) -> Iterable[ModelLoad]:
        for served in self.models.models:
            yield ModelLoad(served.name, served.model.queue_depth, served.model.pending)
