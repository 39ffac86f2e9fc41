"""Where a tool call ends: a marker within an argument is content.

While a grammar describes the call, the grammar decides: a marker ends the call
where the grammar may end behind it. Without a grammar the strings of the
arguments are followed: a marker within one is content. Used by `PhaseTracker`,
by the model thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from erllama.engine.grammar.matcher import Matcher
from erllama.errors import GrammarError

_WHITE = " \t\r\n"
# What stands before a string and behind it, in JSON, in Python's arguments and in Gemma's.
_BEFORE, _BEHIND = "{[(,:=", "}]),:"


class CallEnds:
    """Reads one call, and decides which markers in it count.

    Args:
        runs: splits a script into texts and special tokens (`Script.runs`).
        quotes: texts that begin and end strings in the arguments; as script.
        grammar: the grammar of calls, at its start; None where no grammar describes them. It is used up.
    """

    def __init__(
        self, runs: Callable[[str], Iterator[bytes | int]], quotes: Sequence[str], grammar: Matcher | None
    ) -> None:
        self._runs, self._grammar = runs, grammar
        self._strings = _Strings(quotes)

    @property
    def within_string(self) -> bool:
        """Whether what comes next is within a string."""
        return self._strings.within

    def read(self, script: str) -> None:
        """Go on by a part of the call."""
        self._strings.read(script)
        if self._grammar is not None and not self._goes_on(self._grammar, script):
            self._grammar = None

    def may_end(self, marker: str) -> bool | None:
        """Whether the grammar lets a call end with this marker here; None where no grammar decides."""
        if self._grammar is None:
            return None
        ahead = self._grammar.fork()
        return self._goes_on(ahead, marker) and ahead.accepting

    def _goes_on(self, matcher: Matcher, script: str) -> bool:
        """Whether a matcher goes on by all of a script; where it does not, it is of no more use."""
        try:
            for part in self._runs(script):
                if isinstance(part, int):
                    matcher.accept(part)
                elif not matcher.accept_text(part):
                    return False
        except GrammarError:
            return False
        return True


class _Strings:
    """Follows the strings in arguments, in whatever pieces they come.

    A quote of one character may be escaped by a backslash, and its string has no line end. Where a quote stands
    where no string begins or ends, the arguments are malformed: from there on nothing in them counts as a string.
    """

    def __init__(self, quotes: Sequence[str]) -> None:
        self._quotes = tuple(quotes)
        self._quote = ""  # of the string that this is within
        self._last = ""  # the last character that is no white space; outside of strings
        self._rest = ""  # what may be the beginning of a quote
        self._escaped = self._ended = self._malformed = False

    @property
    def within(self) -> bool:
        return bool(self._quote)

    def read(self, script: str) -> None:
        if not self._quotes or self._malformed:
            return
        script, self._rest = self._rest + script, ""
        at = 0
        while at < len(script) and not self._malformed:
            quotes = (self._quote,) if self._quote else self._quotes
            found = next((quote for quote in quotes if script.startswith(quote, at)), "")
            rest = script[at:]
            if not found and any(quote.startswith(rest) for quote in quotes):
                self._rest = rest
                return
            if self._quote:
                self._take_within(found, script[at])
            else:
                self._take_outside(found, script[at])
            at += len(found) or 1

    def _take_within(self, quote: str, character: str) -> None:
        if len(self._quote) == 1:
            if self._escaped:
                self._escaped = False
                return
            if character == "\\":
                self._escaped = True
                return
            self._break_at(character < " ")
        if quote:
            self._quote, self._last, self._ended = "", quote[-1], True

    def _take_outside(self, quote: str, character: str) -> None:
        if quote:
            self._break_at(self._last not in _BEFORE or not self._last)
            self._quote = "" if self._malformed else quote
        elif character not in _WHITE:
            self._break_at(self._ended and character not in _BEHIND)
            self._last, self._ended = character, False

    def _break_at(self, malformed: bool) -> None:
        if malformed:
            self._quote, self._malformed = "", True
