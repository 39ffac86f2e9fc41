"""What the configuration says about a model: `ModelEntry`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from erllama.checks import choice
from erllama.server.conduct.durations import parse_duration

LOAD_TIMES = ("start", "request")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model that a configuration names.

    Attributes:
        path: of the GGUF file.
        name: that clients use; None for the name of the file.
        aliases: further names. "*" for every name that no model has.
        special_tokens_in_content: as in `ServedModel`.
        load: when the model is loaded: "start" of the server, or first "request".
        keep_alive: time after its last request until it is unloaded: seconds, or a text such as "5m" or "forever".
            None for the server's default.
        options: of `load_model`, by name.
        lines: the lines of the configuration file that set these, by the names of the options; empty without one.

    Raises:
        OptionError: `load` or `keep_alive` is wrong.
    """

    path: Path
    name: str | None = None
    aliases: tuple[str, ...] = ()
    special_tokens_in_content: bool = False
    load: Literal["start", "request"] = "start"
    keep_alive: float | str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        choice("load", self.load, LOAD_TIMES)
        if self.keep_alive is not None:
            parse_duration("keep_alive", self.keep_alive)

    @property
    def id(self) -> str:
        """The name that clients use."""
        return self.name or self.path.stem

    @property
    def names(self) -> list[tuple[str, str]]:
        """The name and the aliases, each after the option that sets it."""
        own = ("path" if self.name is None else "name", self.id)
        return [own, *(("aliases", alias) for alias in self.aliases)]

    def is_same_load(self, other: ModelEntry) -> bool:
        """Return whether a model loaded for the one entry may serve the other."""
        return (self.id, self.path, dict(self.options)) == (other.id, other.path, dict(other.options))
