"""The interface to llguidance: vocabularies, compilation on a large stack, and error messages.

Only `engine.grammar.grammar`, `engine.grammar.matcher` and `engine.grammar.schemas` call this.
"""

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
from erllama.engine.grammar.forced_tokens import ForcedTokenizer

NO_CONTINUATION = "the grammar allows no text here"
# llguidance's own limits with two exceptions. A row of its parser holds an item for each parse of the text, and
# right recursion makes many (the default is 2000). And computing a mask may take about 10 ms for these items, not
# 2.5 ms.
_LIMITS = LLParserLimits(max_items_in_row=20_000, step_max_items=200_000, verbose_errors=False)
# llguidance compiles nested rules recursively, with up to about 10 kB of stack each. This size is enough for every
# grammar within our limits. Only the used part of a stack takes memory.
_STACK = 256 << 20
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)", re.DOTALL)
_REGEX_ERROR = re.compile(r"regex parse error:\n(.*?)\nerror: (.*?)(?:\n|$)", re.DOTALL)
_LIMIT = re.compile(r"lexer error|too (?:many|big|complex|large)|max is|at most|limit|panic", re.IGNORECASE)
# Its message about schemas that refer to themselves and that a value must match together.
_ENDLESS_INTERSECTION = "Schema intersection stack level exceeded"
# Beginnings of its messages about unsupported features and sizes.
_UNSUPPORTED_PREFIXES = (
    *("oneOf constraints are not supported", "Unimplemented keys", "Unable to determine if regex is empty"),
    *("initial lexer configuration", _ENDLESS_INTERSECTION),
)

# llguidance's messages about schemas, reworded in terms of the schema.
_REWORDINGS = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r'failed to parse "%json": (.*?)(?: at line \d+ column \d+)?$', r"the schema cannot be read: \1"),
        (
            r"oneOf constraints are not supported.*",
            "oneOf whose options may match together is not supported; use anyOf, or options whose types or "
            "constants differ",
        ),
        (r"Unimplemented keys: \[(.*)\]", r"keywords that are not supported: \1; leave them out"),
        (
            r"Unsatisfiable schema: Regex is empty: .*",
            "no JSON matches the schema: no text has its pattern and its lengths",
        ),
        (r"Unsatisfiable schema: (.*)", r"no JSON matches the schema: \1"),
        (r"Unable to determine if regex is empty: .*", "a pattern is too large; use a shorter one"),
        (r"Expected f64 for", "Expected a number for"),
        (r"Failed to generate regex for (\w+) range: .*", r"the bounds of the \1 are out of range"),
        (_ENDLESS_INTERSECTION, "allOf, anyOf and references are nested too deeply"),
        (r"json-schema:///", ""),
        (
            r"required property '(.*)' is unsatisfiable",
            r"the property '\1' is required, and no value matches its schema",
        ),
        (
            r"Resource '(.*?)' is not present in a registry.*",
            r"the reference '\1' points outside of the schema; use one within it, such as '#/$defs/name'",
        ),
        (r"Pointer '(.*?)' does not exist", r"the reference '#\1' has no target in the schema"),
        (r"unexpected end of hex escape|lone leading surrogate.*", "a string in it has half a surrogate pair"),
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


class GuidanceVocabulary:
    """A vocabulary for llguidance.

    It adds 256 tokens of one byte each, which consume bytes that do not end at the border of a token, and one token
    that stands for all tokens that end a reply. A matcher never allows the added tokens.

    Attributes:
        n_tokens: the size of the vocabulary.
        n_total: the size with the added tokens.
        end_token: the added token that ends a reply.
        eog_ids: the ids of the vocabulary's tokens that end a reply; `eog_set` is the same as a set.
        pieces: by id, the bytes of the token; empty for a token without text.
        without_text: the ids of the tokens without text.
        tokenizer: the vocabulary as llguidance's object.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        n = self.n_tokens = vocabulary.n_tokens
        self.end_token, self.n_total = n + 256, n + 257
        self.eog_ids = np.flatnonzero(vocabulary.is_eog)
        self.eog_set = frozenset(self.eog_ids.tolist())
        # No text has the byte 0xFF. llguidance would read a token with it as the name of a token.
        pieces = (vocabulary.piece(token) for token in range(n))
        self.pieces = [b"" if b"\xff" in piece else piece for piece in pieces]
        for token in self.eog_set:
            self.pieces[token] = b""
        self.without_text = np.array([token for token in range(n) if not self.pieces[token]], np.int64)
        texts = [*self.pieces, *(bytes([byte]) for byte in range(256))]
        for token in self.without_text.tolist():
            name = vocabulary.detokenize([token], special=True)
            # llguidance marks a token without text by this byte and its name, such as <|name|> in Lark.
            texts[token] = b"\xff" + name if name.startswith(b"<") else b""
        self.tokenizer = LLTokenizer(_TokenizerWrapper(texts, n))  # type: ignore[arg-type]
        self._forced_tokenizer: ForcedTokenizer | None = None

    def forced_tokenizer(self) -> ForcedTokenizer:
        # Two threads may both make it. The results are equal.
        if self._forced_tokenizer is None:
            self._forced_tokenizer = ForcedTokenizer(self._vocabulary, self.pieces)
        return self._forced_tokenizer


class _TokenizerWrapper:
    """The object from which llguidance reads a vocabulary.

    `ForcedTokenizer` tokenizes forced text, so this object only needs to return the added byte tokens.
    """

    is_tokenizer_wrapper = True
    eos_token_id = None
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], first_byte: int) -> None:
        self.tokens, self._first_byte = tokens, first_byte

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._first_byte + byte for byte in (text.encode() if isinstance(text, str) else text)]


class ErrorDescription(NamedTuple):
    """An error of llguidance in one line, and its place in the grammar."""

    text: str
    line: int | None
    column: int | None


def compile_grammar(vocabulary: GuidanceVocabulary, lark_source: str) -> LLMatcher:
    """Compile a grammar. The result may be in an error state."""
    return _run_on_large_stack(lambda: LLMatcher(vocabulary.tokenizer, lark_source, log_level=0, limits=_LIMITS))


def validate(lark_source: str) -> str:
    """Return the error of a grammar that is wrong for every vocabulary; an empty string if it has no error."""
    return _run_on_large_stack(lambda: LLMatcher.validate_grammar(lark_source, limits=_LIMITS))


def is_limit(raw: str) -> bool:
    """Return whether an error means that a grammar is too large, not that a text is outside of its language."""
    return _LIMIT.search(raw.partition("\n")[0]) is not None


def is_unsupported(raw: str) -> bool:
    """Return whether an error means that llguidance lacks a feature, or that a grammar is too large."""
    first = raw.partition("\n")[0]
    return first.startswith(_UNSUPPORTED_PREFIXES) or is_limit(raw)


def is_endless_intersection(raw: str) -> bool:
    """Return whether an error means that schemas that refer to themselves cannot be combined."""
    return _ENDLESS_INTERSECTION in raw


def describe_error(raw: str) -> ErrorDescription:
    """Reduce an error to one line."""
    place = _PLACE.match(raw)
    line, column = (int(place.group(1)), int(place.group(2))) if place else (None, None)
    text = place.group(3) if place else raw
    regex = _REGEX_ERROR.search(text)
    return ErrorDescription(_describe_regex_error(regex) if regex else _first_line(text), line, column)


def _describe_regex_error(found: re.Match[str]) -> str:
    shown = found.group(1).split("\n")
    caret = shown[-1].find("^")
    # The pattern is indented by four, with carets below it. For a pattern of several lines only the problem is
    # shown.
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
    for pattern, words in _REWORDINGS:
        first = pattern.sub(words, first)
    if first == "NoExtensionBias":
        return NO_CONTINUATION
    return f"{first} (at {within.group(1)})" if within else first


_stack_size = threading.Lock()
_default_stack_size = 0  # the usual size, while it is changed


def _after_fork_in_child() -> None:
    # Another thread may have held the lock at the fork, and would have restored the size.
    global _stack_size
    _stack_size = threading.Lock()
    if threading.stack_size() == _STACK:
        threading.stack_size(_default_stack_size)


os.register_at_fork(after_in_child=_after_fork_in_child)


def _run_on_large_stack(make: Callable[[], _T]) -> _T:
    """Call a function on a large stack. Its recursion would overflow a usual stack and end the process."""
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    global _default_stack_size
    with _stack_size:
        # The size applies to all threads that start meanwhile. A larger stack is harmless: it is only reserved.
        usual = _default_stack_size = threading.stack_size()
        try:
            threading.stack_size(_STACK)
            # Not a daemon: the exit of the interpreter would stop it within llguidance.
            threading.Thread(target=work, name="erllama-grammar", daemon=False).start()
        finally:
            threading.stack_size(usual)
    return future.result()
