"""Options of the server. `erllama.server.app` takes them, and the command and its configuration file set them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from erllama.cache.sizes import parse_bytes
from erllama.checks import boolean, integer, real, reject_unknown, shown
from erllama.errors import OptionError
from erllama.server.conduct.durations import parse_duration
from erllama.server.conduct.keys import ApiKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How the server behaves.

    Attributes:
        keys: the keys that clients may use. Empty: no key is needed.
        allowed_hosts: values of the Host header that are accepted besides those of this machine. "*" for any.
        cors_origins: origins whose pages may call the server. "*" for any. Empty: none.
        max_body_bytes: maximum size of a request's body.
        max_json_depth: maximum nesting of a body.
        body_timeout: seconds within which a body must arrive.
        keep_alive_seconds: seconds between comments that keep a quiet stream open.
        restart_wait: seconds for which a new request waits while its model's process is being replaced.
        shutdown_seconds: seconds that running requests have to finish when the server stops.
        log_prompts: write prompts to the access log.
        drop_unstable_headers: remove what clients put into prompts and change on each request. The list is in
            docs/server/anthropic.md.
        model_keep_alive: time after its last request until a model is unloaded, where it has no own: seconds, or a
            text such as "5m" or "forever". Models that `app` gets stay loaded.
        memory_limit: memory for all models that the server loads: bytes, or a text such as "12GiB". None for nine
            tenths of what is available at the start on this machine, within the limits of its cgroups, and on its
            GPUs.
        memory_wait: seconds for which a request waits until models in use make room for its model.
        memory_pressure: used fraction of the machine's memory, or of a cgroup's limit, from which idle models are
            unloaded, the least recently used first. 1.0 for never.
        page: serve the chat page at `/`.
        slots: answer `/slots`, which shows how many requests run.
        metrics: answer `/metrics`.
        max_stored_responses: how many responses `/v1/responses` keeps for `previous_response_id`. 0 for none.
        state_dir: directory for what the server keeps over a restart: the stored responses, with their prompts, in
            a file that only its owner can read. None for the cache's directory, or for memory without one.
    """

    keys: tuple[ApiKey, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    max_json_depth: int = 128
    body_timeout: float = 60.0
    keep_alive_seconds: float = 15.0
    restart_wait: float = 30.0
    shutdown_seconds: float = 30.0
    log_prompts: bool = False
    drop_unstable_headers: bool = True
    max_stored_responses: int = 1000
    state_dir: str | Path | None = None
    model_keep_alive: float | str = "forever"
    memory_limit: int | str | None = None
    memory_wait: float = 30.0
    memory_pressure: float = 0.95
    page: bool = True
    slots: bool = True
    metrics: bool = True

    def __post_init__(self) -> None:
        integer("max_body_bytes", self.max_body_bytes, 1)
        integer("max_json_depth", self.max_json_depth, 1)
        integer("max_stored_responses", self.max_stored_responses, 0)
        for name in ("allowed_hosts", "cors_origins"):
            texts(name, getattr(self, name))
        for name in ("body_timeout", "keep_alive_seconds"):
            real(name, getattr(self, name), 0.001)
        parse_duration("model_keep_alive", self.model_keep_alive)
        if self.memory_limit is not None and not parse_bytes("memory_limit", self.memory_limit):
            raise OptionError('memory_limit is 0; pass the bytes for all models, such as "12GiB", or leave it out')
        real("memory_pressure", self.memory_pressure, 0.01, 1.0)
        for name in ("restart_wait", "shutdown_seconds", "memory_wait"):
            real(name, getattr(self, name), 0.0)
        for name in ("log_prompts", "drop_unstable_headers", "page", "slots", "metrics"):
            boolean(name, getattr(self, name))
        if not isinstance(self.state_dir, str | Path | None):
            raise OptionError(f"state_dir={shown(self.state_dir)}; pass the path of a directory, or None")
        secrets = [key.secret for key in self.keys]
        if len(set(secrets)) < len(secrets):
            raise OptionError("two keys are equal; remove one")

    @classmethod
    def of(cls, options: Mapping[str, object]) -> ServerOptions:
        """Return the options with these names and values; the others have their defaults."""
        known = [each.name for each in fields(cls)]
        reject_unknown({name: value for name, value in options.items() if name not in known}, known, "app")
        return cls(**options)  # type: ignore[arg-type]


def texts(name: str, value: object) -> tuple[str, ...]:
    """Return a list of texts as a tuple; raise OptionError for anything else, such as one text."""
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(each, str) for each in value)
    ):
        raise OptionError(f"{name} must be a list of texts, not {shown(value)}")
    return tuple(value)
