"""The end of a tool call: a marker within an argument is content.

While a grammar describes the call, the grammar decides: a marker ends the call only where the grammar accepts the
end after it. Without a grammar, the strings of the arguments are followed, and a marker within a string is
content. Used by `PhaseTracker`, in the model thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from erllama.engine.grammar.matcher import Matcher
from erllama.engine.output.text import WHITE
from erllama.errors import GrammarError

# The characters before and after a string, in JSON, in Python's arguments and in Gemma's.
_BEFORE, _AFTER = "{[(,:=", "}]),:"


class CallEnds:
    """Reads one call, and decides which markers in it count.

    Args:
        split: splits encoded text into texts and special tokens (`TokenCodec.split`).
        quotes: encoded texts that begin and end strings in the arguments.
        grammar: a matcher at the start of the grammar of calls, which this class advances; None if no grammar
            describes the call.
    """

    def __init__(
        self, split: Callable[[str], Iterator[bytes | int]], quotes: Sequence[str], grammar: Matcher | None
    ) -> None:
        self._split, self._grammar = split, grammar
        self._strings = _StringTracker(quotes)

    @property
    def within_string(self) -> bool:
        """Whether the next character is within a string."""
        return self._strings.within

    def read(self, encoded: str) -> None:
        """Read the next part of the call."""
        self._strings.read(encoded)
        if self._grammar is not None and not self._accepts(self._grammar, encoded):
            self._grammar = None

    def may_end(self, marker: str) -> bool | None:
        """Return whether the grammar lets the call end with this marker here; None without a grammar."""
        if self._grammar is None:
            return None
        ahead = self._grammar.fork()
        return self._accepts(ahead, marker) and ahead.accepting

    def _accepts(self, matcher: Matcher, encoded: str) -> bool:
        """Advance a matcher by a text. Returns False if it does not accept all of it; it is then unusable."""
        try:
            for part in self._split(encoded):
                if isinstance(part, int):
                    matcher.accept(part)
                elif not matcher.accept_text(part):
                    return False
        except GrammarError:
            return False
        return True


class _StringTracker:
    """Follows the strings in arguments, however the text is cut.

    A quote of one character may be escaped by a backslash, and its string has no line end. A quote where no string
    may begin or end makes the arguments malformed: from there on, no text in them counts as a string.
    """

    def __init__(self, quotes: Sequence[str]) -> None:
        self._quotes = tuple(quotes)
        self._quote = ""  # of the current string
        self._last = ""  # the last character outside strings that is not white space
        self._rest = ""  # may be the beginning of a quote
        self._escaped = self._ended = self._malformed = False

    @property
    def within(self) -> bool:
        return bool(self._quote)

    def read(self, encoded: str) -> None:
        """Read the next part of the arguments."""
        if not self._quotes or self._malformed:
            return
        encoded, self._rest = self._rest + encoded, ""
        at = 0
        while at < len(encoded) and not self._malformed:
            quotes = (self._quote,) if self._quote else self._quotes
            found = next((quote for quote in quotes if encoded.startswith(quote, at)), "")
            rest = encoded[at:]
            if not found and any(quote.startswith(rest) for quote in quotes):
                self._rest = rest
                return
            if self._quote:
                self._read_within(found, encoded[at])
            else:
                self._read_outside(found, encoded[at])
            at += len(found) or 1

    def _read_within(self, quote: str, character: str) -> None:
        if len(self._quote) == 1:
            if self._escaped:
                self._escaped = False
                return
            if character == "\\":
                self._escaped = True
                return
            self._stop_if(character < " ")
        if quote:
            self._quote, self._last, self._ended = "", quote[-1], True

    def _read_outside(self, quote: str, character: str) -> None:
        if quote:
            self._stop_if(self._last not in _BEFORE or not self._last)
            self._quote = "" if self._malformed else quote
        elif character not in WHITE:
            self._stop_if(self._ended and character not in _AFTER)
            self._last, self._ended = character, False

    def _stop_if(self, malformed: bool) -> None:
        if malformed:
            self._quote, self._malformed = "", True
