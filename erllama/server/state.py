"""What all requests of a server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from erllama.server.conduct.prefix_watch import PrefixWatch
from erllama.server.conduct.rate_limits import RateLimits
from erllama.server.models import ModelPool
from erllama.server.options import ServerOptions


@dataclass(slots=True)
class Server:
    """The models, the options and the limits of one server. Used by its event loop.

    Attributes:
        models: the models, by name.
        options: how the server behaves.
        rate_limits: what each key has used.
        signing_key: signs thinking, so that thoughts which a client changed are found when it sends them back.
        prefixes: recent prompts, to find conversations whose prefix changes.
        is_stopping: whether the server accepts no further requests.
    """

    models: ModelPool
    options: ServerOptions
    signing_key: bytes
    rate_limits: RateLimits = field(default_factory=RateLimits)
    prefixes: PrefixWatch = field(default_factory=PrefixWatch)
    is_stopping: bool = False
