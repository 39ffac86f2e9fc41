"""The result of one check of `erllama doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `erllama doctor --json` prints these fields.

    Attributes:
        name: the thing that was checked.
        state: "warning" if it works and could be better.
        text: the result.
        fix: a command or advice; empty if no action is needed.
    """

    name: str
    state: State
    text: str
    fix: str = ""
