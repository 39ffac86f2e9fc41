"""What `erllama doctor` finds: each thing it looked at, how that is, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it is.
        state: "note" for what works, and could be better.
        text: how it is.
        mend: what to do about it; empty where nothing is to be done.
    """

    what: str
    state: State
    text: str
    mend: str = ""
