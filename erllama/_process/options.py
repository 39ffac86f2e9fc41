"""`ProcessOptions`: how the process of a model is supervised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from erllama.cache.sizes import parse_bytes
from erllama.checks import integer, real, reject_unknown, shown
from erllama.errors import OptionError


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """How the process of a model is supervised.

    Attributes:
        max_restarts: how many times the process is replaced within `restart_window`. When it ends once more, its
            requests fail with ModelFailed. 0 to never replace it.
        restart_window: the length of that window, in seconds.
        hang_timeout: seconds without a sign of life, or in one decode, after which the process is killed and
            replaced. A decode may take ten times as long as measured ones, so that slow models are not killed.
        memory_limit: the most memory that the process may use, as "8GiB" or in bytes: what it has allocated,
            without the mapped model file. A process above it is killed and replaced. None for no limit.
    """

    max_restarts: int = 3
    restart_window: float = 60.0
    hang_timeout: float = 30.0
    memory_limit: str | int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "max_restarts", integer("process: max_restarts", self.max_restarts, 0))
        put(self, "restart_window", real("process: restart_window", self.restart_window, 0.0))
        put(self, "hang_timeout", real("process: hang_timeout", self.hang_timeout, 0.1))
        if self.memory_limit is not None:
            limit = parse_bytes("process: memory_limit", self.memory_limit)
            put(self, "memory_limit", integer("process: memory_limit", limit, 1))

    @classmethod
    def of(cls, value: object) -> ProcessOptions | None:
        """Return the options that `value` stands for; None for a model in the caller's process.

        Args:
            value: True for the defaults, False, a ProcessOptions, or a mapping of its options.

        Raises:
            OptionError: `value` is of another type, or an option is unknown or invalid.
        """
        if value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, ProcessOptions):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(
                f"process={shown(value)}; pass True, False, an erllama.ProcessOptions, or a mapping of its options"
            )
        options = {str(name): option for name, option in value.items()}
        known = [field.name for field in fields(cls)]
        reject_unknown({name: options[name] for name in options if name not in known}, known, "process")
        return cls(**options)
