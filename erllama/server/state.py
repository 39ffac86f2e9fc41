"""What all requests of a server share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from erllama.server.conduct.keys import ApiKey
from erllama.server.conduct.metrics import EndedCall, ModelReading, ServerMetrics
from erllama.server.conduct.prefix_watch import PrefixWatch
from erllama.server.conduct.rate_limits import RateLimits
from erllama.server.hit_history import HitHistory
from erllama.server.models import ModelPool
from erllama.server.pins import ClientPins, ConfiguredPins
from erllama.server.settings.options import ServerOptions
from erllama.server.stored_responses import ResponseStore


@dataclass(slots=True)
class Server:
    """The models, the options and the limits of one server. Used by its event loop.

    Attributes:
        models: the models, by name.
        options: how the server behaves.
        rate_limits: what each key has used.
        responses: the responses that `/v1/responses` keeps.
        signing_key: signs thinking, so that thoughts which a client changed are found when it sends them back; and
            makes the names of clients' pins.
        prefixes: recent prompts, to find conversations whose prefix changes.
        is_stopping: whether the server accepts no further requests.
        claimed_sessions: the sessions of running requests that clients suggested; see `replies.sessions`.
        history: how much of the prompts the cache had, over time.
        configured_pins: pins the prefixes that the configuration names.
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
    history: HitHistory = field(default_factory=HitHistory)
    configured_pins: ConfiguredPins = field(default_factory=ConfiguredPins)
    client_pins: ClientPins = field(init=False)
    metrics: ServerMetrics = field(init=False)

    def __post_init__(self) -> None:
        self.client_pins = ClientPins(self.signing_key)
        self.metrics = ServerMetrics(self._read_models, lambda: self.models.lifecycle.room.limit)

    def count(self, call: EndedCall | None, key: ApiKey | None, status: int, seconds: float) -> None:
        """Count a request that ended. Arguments as of `ServerMetrics.count`."""
        self.metrics.count(call, key, status, seconds)
        if call is not None and call.model and call.prompt_tokens:
            self.history.add(call.model, call.prompt_tokens, call.cached_tokens, call.completion_tokens)

    def _read_models(self) -> Iterable[ModelReading]:
        lifecycle = self.models.lifecycle
        for model in self.models.models:
            name = model.name
            yield ModelReading(
                name,
                model.served is not None,
                model.n_slots_in_use,
                model.n_waiting,
                model.n_slots,
                model.memory,
                lifecycle.loads[name],
                lifecycle.load_failures[name],
                {reason: n for (of, reason), n in lifecycle.unloads.items() if of == name},
            )
