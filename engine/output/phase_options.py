"""The markers that separate the phases of a reply: thinking, tool calls and the answer.

Immutable values. Chats make a `PhaseOptions` from the model's family and the caller's options;
`RequestOptions.phases` passes it to the `PhaseTracker`.
"""

from __future__ import annotations

from dataclasses import dataclass

from erllama.checks import boolean, encodable, integer
from erllama.engine.grammar.grammar import Grammar
from erllama.errors import OptionError


@dataclass(frozen=True, slots=True)
class Markers:
    """The texts, special tokens spelled out, at which a phase begins and ends.

    Attributes:
        open: each of them begins the phase.
        close: each of them ends it; empty for a phase that ends with the reply.
    """

    open: tuple[str, ...]
    close: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            object.__setattr__(self, name, _texts(f"the {name} markers", getattr(self, name)))
        if not self.open:
            raise OptionError("markers without an opening one; pass at least one")


@dataclass(frozen=True, slots=True)
class PhaseOptions:
    """How the phases of a reply are separated.

    Attributes:
        thinking: markers around thinking; None for a model that does not think.
        calls: markers around tool calls; None for a model that has none.
        payload: markers around the arguments within a call; the rest is syntax, which is sampled greedily. None
            for a call that is all arguments.
        quotes: texts that begin and end strings in the arguments: a marker within a string is content. Quotes of
            one character may be escaped by a backslash. () for arguments without quotes: an argument then ends
            only at the payload's closing marker.
        leading: JSON texts, compared without white space. An answer that begins with one of them is a call.
        skip: texts between phases, which are removed.
        call_grammar: the grammar of a call, from its opening marker on, and of all that follows; None for any text.
        calls_only: the whole answer must match `call_grammar`.
        starts_in_thinking: whether the reply begins with thinking; None if it does after a prompt that ends with an
            opening marker.
        open_marker: a marker, or the beginning of one, at the prompt's end, which the reply continues.
        thinking_budget: maximum number of tokens of thinking. Then the engine inserts the closing marker. None for
            no limit.
        budget_message: the text inserted before that marker.
        signing_key: signs thinking with HMAC-SHA256; None for no signature.
    """

    thinking: Markers | None = None
    calls: Markers | None = None
    payload: Markers | None = None
    quotes: tuple[str, ...] = ('"',)
    leading: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    call_grammar: Grammar | None = None
    calls_only: bool = False
    starts_in_thinking: bool | None = None
    open_marker: str = ""
    thinking_budget: int | None = None
    budget_message: str = ""
    signing_key: bytes | None = None

    def __post_init__(self) -> None:
        for name in ("thinking", "calls", "payload"):
            if not isinstance(getattr(self, name), Markers | None):
                raise OptionError(f"{name}={getattr(self, name)!r}; pass Markers, or None")
        for name in ("quotes", "leading", "skip"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if self.starts_in_thinking is not None:
            boolean("starts_in_thinking", self.starts_in_thinking)
        if self.thinking_budget is not None:
            object.__setattr__(self, "thinking_budget", integer("thinking_budget_tokens", self.thinking_budget, 0))
        if not isinstance(self.budget_message, str):
            raise OptionError(f"thinking_budget_message={self.budget_message!r}; pass a text")
        encodable("thinking_budget_message", self.budget_message)
        if self.signing_key is not None and (not isinstance(self.signing_key, bytes) or not self.signing_key):
            raise OptionError("thinking_signing_key must be bytes, at least one, or None")
        if self.thinking_budget is not None and (self.thinking is None or not self.thinking.close):
            raise OptionError("thinking_budget_tokens for a model without thinking markers; pass thinking_markers")


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise OptionError(f"{name}: {value!r}; pass a text, or several, none of them empty")
    return tuple(encodable(name, text) for text in texts)
