"""llguidance, as far as it is used: a vocabulary's tokens, compiling without harm, and errors in one line."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from erllama.engine.backend import Vocabulary
from erllama.engine.grammar.forced_tokens import Spelling

NO_TEXT = "nothing can come here: no text of the grammar goes on"
# llguidance's own limits, but for two: a row of its parser holds an item for each way a text can be read, which
# right recursion makes many of (2000 by default), and a mask may take about 10 ms of making them, not 2.5.
_LIMITS = LLParserLimits(max_items_in_row=20_000, step_max_items=200_000, verbose_errors=False)
# It compiles rules within rules on the stack, at up to about 10 kB each; a stack of its own has room for more than
# any text of ours can ask. Only what is used of it is memory.
_STACK = 256 << 20
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)", re.DOTALL)
_REGEX_ERROR = re.compile(r"regex parse error:\n(.*?)\nerror: (.*?)(?:\n|$)", re.DOTALL)
_LIMIT = re.compile(r"lexer error|too (?:many|big|complex|large)|max is|at most|limit|panic", re.IGNORECASE)
# How its messages about what it does not have, or about sizes, begin.
_NOT_SUPPORTED = (
    *("oneOf constraints are not supported", "Unimplemented keys", "Unable to determine if regex is empty"),
    *("initial lexer configuration", "Schema intersection stack level exceeded"),
)

# llguidance's messages about schemas in the words of schemas: what it says of itself means nothing to a reader.
_WORDS = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r'failed to parse "%json": (.*?)(?: at line \d+ column \d+)?$', r"the schema cannot be read: \1"),
        (
            r"oneOf constraints are not supported.*",
            "oneOf whose options may hold together is not supported; use anyOf, or options whose types or "
            "constants differ",
        ),
        (r"Unimplemented keys: \[(.*)\]", r"keywords that are not supported: \1; leave them out"),
        (
            r"Unsatisfiable schema: Regex is empty: .*",
            "no JSON has the schema: no text has its pattern and its lengths",
        ),
        (r"Unsatisfiable schema: (.*)", r"no JSON has the schema: \1"),
        (r"Unable to determine if regex is empty: .*", "a pattern is too large; use a shorter one"),
        (r"Expected f64 for", "Expected a number for"),
        (r"Failed to generate regex for (\w+) range: .*", r"the bounds of the \1 are out of range"),
        (r"Schema intersection stack level exceeded", "allOf, anyOf and references lead too deep"),
        (r"json-schema:///", ""),
        (
            r"required property '(.*)' is unsatisfiable",
            r"the property '\1' is required, and no value has its schema",
        ),
        (
            r"Resource '(.*?)' is not present in a registry.*",
            r"the reference '\1' leads out of the schema; only those within it, as '#/$defs/name', are supported",
        ),
        (r"Pointer '(.*?)' does not exist", r"the reference '#\1' leads nowhere in the schema"),
        (r"unexpected end of hex escape|lone leading surrogate.*", "a text in it has half a surrogate pair"),
        (
            r"Value for 'multipleOf' has too many digits: .*",
            "multipleOf has too many digits; at most 9 are supported",
        ),
        (
            r"initial lexer configuration.*",
            "the grammar is too large to compile; use fewer rules and shorter texts",
        ),
        (r"panic.*", "the grammar is too large to compile; use fewer rules and shorter texts"),
    )
)

_T = TypeVar("_T")


class Tokens:
    """A vocabulary as llguidance takes it.

    Behind the vocabulary's own tokens are 256 of one byte each, by which bytes are read that are not at the borders
    of tokens, and one that stands for all that end a reply. They are never in what a matcher allows.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        n = self.n_tokens = vocabulary.n_tokens
        self.end, self.n_all = n + 256, n + 257
        self.ends = np.flatnonzero(vocabulary.is_eog)
        self.end_set = frozenset(self.ends.tolist())
        # No text has the byte 0xFF; a token with it would be taken for the name of one.
        found = (vocabulary.piece(token) for token in range(n))
        self.pieces = [b"" if b"\xff" in piece else piece for piece in found]
        for token in self.end_set:
            self.pieces[token] = b""
        self.silent = np.array([token for token in range(n) if not self.pieces[token]], np.int64)
        texts = [*self.pieces, *(bytes([byte]) for byte in range(256))]
        for token in self.silent.tolist():
            name = vocabulary.detokenize([token], special=True)
            # So llguidance marks what is no text and has a name, as <|name|> in Lark.
            texts[token] = b"\xff" + name if name.startswith(b"<") else b""
        self.trie = LLTokenizer(_Wrapper(texts, n))  # type: ignore[arg-type]
        self._spelling: Spelling | None = None

    def spelling(self) -> Spelling:
        # Made twice by two threads it is the same.
        if self._spelling is None:
            self._spelling = Spelling(self._vocabulary, self.pieces)
        return self._spelling


class _Wrapper:
    """What llguidance reads a vocabulary from. It writes no tokens: what is forced is spelled by `Spelling`."""

    is_tokenizer_wrapper = True
    eos_token_id = None
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], first_byte: int) -> None:
        self.tokens, self._first_byte = tokens, first_byte

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._first_byte + byte for byte in (text.encode() if isinstance(text, str) else text)]


class Message(NamedTuple):
    """An error of llguidance in one line, and where in what it was given."""

    text: str
    line: int | None
    column: int | None


def compiled(tokens: Tokens, written: str) -> LLMatcher:
    """A grammar compiled; it may be in a state of error."""
    return _on_a_large_stack(lambda: LLMatcher(tokens.trie, written, log_level=0, limits=_LIMITS))


def problem_of(written: str) -> str:
    """What is wrong with a grammar whatever the vocabulary; empty if nothing is."""
    return _on_a_large_stack(lambda: LLMatcher.validate_grammar(written, limits=_LIMITS))


def is_limit(raw: str) -> bool:
    """Whether an error is of a grammar that takes too much, and not of a text that is none of it."""
    return _LIMIT.search(raw.partition("\n")[0]) is not None


def is_unsupported(raw: str) -> bool:
    """Whether an error is of what llguidance does not have, or of a grammar that takes too much."""
    first = raw.partition("\n")[0]
    return first.startswith(_NOT_SUPPORTED) or is_limit(raw)


def message(raw: str) -> Message:
    """An error in one line."""
    place = _PLACE.match(raw)
    line, column = (int(place.group(1)), int(place.group(2))) if place else (None, None)
    text = place.group(3) if place else raw
    regex = _REGEX_ERROR.search(text)
    return Message(_of_regex(regex) if regex else _first_line(text), line, column)


def _of_regex(found: re.Match[str]) -> str:
    shown = found.group(1).split("\n")
    caret = shown[-1].find("^")
    # Indented by four, the pattern, and below it carets; of a pattern of several lines only what is wrong is told.
    if len(shown) != 2 or caret < 4:
        return found.group(2)
    pattern = shown[0][4:]
    start = max(0, caret - 24)
    return f"column {caret - 3} of the pattern: {found.group(2)}: {pattern[start : start + 40]!r}"


def _first_line(text: str) -> str:
    within = re.search(r"while processing json-schema:///(\S*)", text)
    first = text.removeprefix("failed to compile JSON schema: ").partition("\n")[0]
    if first.startswith("invalid regex "):
        first = first.partition(" (in regex): ")[2] or first
    for pattern, words in _WORDS:
        first = pattern.sub(words, first)
    if first == "NoExtensionBias":
        return NO_TEXT
    return f"{first} (at {within.group(1)})" if within else first


_stack_size = threading.Lock()
_usual_size = 0  # of stacks, while it is changed


def _after_fork_in_child() -> None:
    # A thread that was not forked may have held the lock, and would have put the size back.
    global _stack_size
    _stack_size = threading.Lock()
    if threading.stack_size() == _STACK:
        threading.stack_size(_usual_size)


os.register_at_fork(after_in_child=_after_fork_in_child)


def _on_a_large_stack(make: Callable[[], _T]) -> _T:
    """Call something that recurses deeper than the stacks of threads allow, which would end the process."""
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    global _usual_size
    with _stack_size:
        # The size is of all threads begun meanwhile; larger is no harm, as it is only reserved.
        usual = _usual_size = threading.stack_size()
        try:
            threading.stack_size(_STACK)
            # No daemon: the interpreter's exit would end it in the midst of llguidance.
            threading.Thread(target=work, name="erllama-grammar", daemon=False).start()
        finally:
            threading.stack_size(usual)
    return future.result()
