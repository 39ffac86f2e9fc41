"""Grammars: what a reply may be, checked when made, and which tokens may come next under one.

A `Grammar` is a value: made anywhere, sent to any model. A `GrammarCompiler`
belongs to a vocabulary and compiles a grammar once; a `Matcher` is one
reply's place in it, and belongs to whoever runs the reply. The work is
llguidance's (https://github.com/guidance-ai/llguidance); GBNF is translated
by `engine.grammar.gbnf` and `engine.grammar.lark_writer`, and what is not llguidance's to know
about a vocabulary is added here.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from erllama.engine.backend import Vocabulary
from erllama.engine.grammar import gbnf
from erllama.engine.grammar import lark_writer as lexemes
from erllama.engine.grammar import llguidance_adapter as guidance
from erllama.engine.grammar.expressions import Token
from erllama.engine.grammar.schemas import json_schema as schemas
from erllama.engine.grammar.unsupported import NotSupported
from erllama.errors import GrammarError

# A grammar's text: past it something generated went wrong, and recursion in the compiler has room for no more.
_MAX_SOURCE = 4 << 20
# Compiled grammars kept: one takes from some kB to some MB, as it is used.
_KEPT = 64
_MAX_RULES = 5000
# A grammar whose first bytes are all certain, as many as llguidance looks ahead, has no end worth waiting for.
_ENDLESS = 100_000
_NO_FORCING = '%llguidance {"no_forcing": true}'
_LARK_RULE = re.compile(r"(?m)^[ \t]*[?!]?[A-Za-z_][\w-]*[^:\n]{0,200}:")
# Perhaps a token, as <|name|> or <[12]>; perhaps only in a string.
_LARK_TOKEN = re.compile(r"<[^<>\s]+>")
# Regular expressions of more characters take seconds, and are too large for llguidance in the end.
_MAX_PATTERN = 1 << 20
# Texts that are options of rules of Lark: the time that they take grows with their square.
_MAX_OPTIONS = 20_000
_OPTION = re.compile(r'\|\s*"')
_KINDS = ("gbnf", "json_schema", "regex", "lark")


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a whole reply must be. Made by one of the class methods; hashable, and equal where it was made alike.

    Attributes:
        kind: "gbnf", "json_schema", "regex" or "lark".
        source: the grammar's text.
        root: the rule of GBNF that a reply matches.
    """

    kind: str
    source: str
    root: str = "root"
    # What llguidance is given; None where that takes a vocabulary, because tokens are referred to.
    written: str | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def gbnf(cls, text: str, root: str = "root") -> Grammar:
        """GBNF, as llama.cpp takes it (see `engine.grammar.gbnf` for the differences).

        References to tokens, as `<[1234]>`, `<|name|>` and `!<|name|>`, are looked up when a model uses them. Where
        a token could be both the text and the token that a grammar refers to, it is the reference.

        Raises:
            GrammarError: with line and column; also where some rule has no text that ends.
        """
        return cls("gbnf", text, root)

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | bool | str) -> Grammar:
        """JSON that a schema describes (draft 2020-12, as far as llguidance has it).

        Properties come in the order in which the schema lists them. Between the parts of the JSON there may be one
        space, or a new line and up to 40 spaces or tabs, and nothing else: a model cannot write white space without
        end. Characters of strings are written as they are: \\u is for control characters only. `x-guidance`, by
        which a schema could change such settings of the compiler, is ignored. A `format` that llguidance does not
        know is an annotation, and is ignored, too.

        Args:
            schema: a mapping, True for any JSON, or a text of one.

        Raises:
            GrammarError: the text is no JSON, with line and column; or a keyword is not supported or contradicts
                another; the message names it.
        """
        return cls("json_schema", schemas.source_of(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object, with white space as in `json_schema`."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """What matches a regular expression as a whole.

        The syntax is that of Rust's regex crate: no lookaround, no back references; `.` is no new line.

        Raises:
            GrammarError: with the column in the pattern.
        """
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Lark, as llguidance takes it (its docs/syntax.md).

        Text is read in lexemes, the longest first: unlike in GBNF, `/[a-z]+/ "x"` matches nothing.

        Raises:
            GrammarError: with line and column.
        """
        return cls("lark", text)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS or not isinstance(self.source, str) or not isinstance(self.root, str):
            raise GrammarError(f"a grammar is a text of one of the kinds {', '.join(_KINDS)}")
        if len(self.source) > _MAX_SOURCE:
            raise GrammarError(f"a grammar of {len(self.source)} characters; at most {_MAX_SOURCE} are compiled")
        if self.kind == "gbnf":
            rules = gbnf.parse(self.source, self.root)
            checked = _written_gbnf(rules, lambda token: "<[0]>")
            object.__setattr__(self, "written", None if rules.tokens else checked)
        else:
            checked = _written(self.kind, self.source)
            object.__setattr__(self, "written", checked)
        if self.kind == "lark" and _LARK_TOKEN.search(self.source):
            # Names and numbers of tokens mean nothing without a vocabulary: the rest is checked without one.
            problem = guidance.problem_of(checked)
            if problem:
                raise _refusal(self, problem)
        else:
            _byte_compiler().check(self, checked)

    def accepts(self, text: str | bytes) -> bool:
        """Whether a whole text is in the language. Needs no model.

        Raises:
            GrammarError: the grammar refers to tokens, so that it needs a vocabulary; or reading took too long.
        """
        if self.written is None:
            raise GrammarError("the grammar refers to tokens: only with a model's vocabulary can it read a text")
        matcher = _byte_compiler().matcher(self)
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        return matcher.accept_text(raw) and matcher.accepting


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Thread-safe; making it is cheap.

    The first grammar takes longer: the vocabulary's tokens are put in a trie, in the thread of who asks.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokens: guidance.Tokens | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Where a reply begins.

        Raises:
            GrammarError: the grammar refers to a token that the vocabulary has not, or is too large to compile.
        """
        with self._lock:
            tokens = self._known_tokens()
            compiled = self._compiled.get(grammar)
            if compiled is None:
                compiled = _compiled(tokens, grammar, self._written(grammar))
                self._keep(grammar, compiled)
            self._compiled.move_to_end(grammar)
            names_tokens = _names_tokens(grammar)
            return Matcher(tokens, compiled.deep_copy(), lambda: self._forget(grammar), names_tokens=names_tokens)

    def check(self, grammar: Grammar, written: str) -> None:
        """Raise GrammarError if what `grammar` was written as has no text, or does not compile."""
        with self._lock:
            tokens = self._known_tokens()
            compiled = _compiled(tokens, grammar, written)
            matcher = Matcher(tokens, compiled.deep_copy(), lambda: None, names_tokens=True)
            if not matcher.allowed().any() and not matcher.accepting:
                raise GrammarError(guidance.NO_TEXT)
            if len(compiled.deep_copy().compute_ff_bytes()) >= _ENDLESS:
                raise GrammarError(f"the grammar has no text that ends within {_ENDLESS} bytes")
            if grammar.written is not None:
                self._keep(grammar, compiled)

    def _keep(self, grammar: Grammar, compiled: LLMatcher) -> None:
        self._compiled[grammar] = compiled
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)

    def _forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._compiled.pop(grammar, None)

    def _known_tokens(self) -> guidance.Tokens:
        if self._tokens is None:
            self._tokens = guidance.Tokens(self._vocabulary)
        return self._tokens

    def _written(self, grammar: Grammar) -> str:
        if grammar.written is not None:
            return grammar.written
        rules = gbnf.parse(grammar.source, grammar.root)
        return _written_gbnf(rules, lambda token: self._reference(token, grammar.source))

    def _reference(self, token: Token, source: str) -> str:
        """A reference to a token in Lark. Tokens that end a reply are none that a grammar can ask for."""
        vocabulary = self._vocabulary
        id = token.token
        if id is None:
            ids = vocabulary.tokenize(token.name, add_special=False, parse_special=True).tolist()
            if len(ids) != 1:
                raise gbnf.error_at(source, token.at, f"{token.name} is {len(ids)} tokens of this model, not one")
            id = ids[0]
        if id >= vocabulary.n_tokens:
            raise gbnf.error_at(source, token.at, f"this model has {vocabulary.n_tokens} tokens")
        if not token.negated:
            if vocabulary.is_eog[id]:
                raise gbnf.error_at(source, token.at, f"token {id} ends a reply; the grammar's end stands for it")
            return f"<[{id}]>"
        wanted = ~np.asarray(vocabulary.is_eog, bool)
        wanted[id] = False
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
        ranges = ",".join(f"{low}-{high - 1}" for low, high in zip(edges[::2], edges[1::2], strict=True))
        return f"<[{ranges}]>"


class Matcher:
    """A reply's place in a grammar: for one reply, and for one thread at a time.

    Args:
        on_limit: called when the grammar met one of llguidance's limits. All copies of what was compiled share what
            they have learnt of it, so none of them is of use any more.
    """

    def __init__(
        self, tokens: guidance.Tokens, native: LLMatcher, on_limit: Callable[[], None], *, names_tokens: bool
    ) -> None:
        self._tokens, self._native, self._on_limit = tokens, native, on_limit
        self._names_tokens = names_tokens
        self._bits = np.zeros((tokens.n_all + 31) // 32, np.uint32)
        self._recent: list[int] = []
        self._begun = self._ended = False

    def fork(self) -> Matcher:
        """Another at the same place, which goes on by itself."""
        fork = Matcher(self._tokens, self._native.deep_copy(), self._on_limit, names_tokens=self._names_tokens)
        fork._recent, fork._begun, fork._ended = list(self._recent), self._begun, self._ended
        return fork

    def allowed(self) -> NDArray[np.bool_]:
        """What may come next.

        Returns:
            shape (n_tokens,), valid until the next call. Tokens that end the reply are allowed where `accepting`.
            Nothing at all is where the reply has ended, or the vocabulary lacks the bytes to go on.

        Raises:
            GrammarError: the grammar takes too long, or too much memory, at this place.
        """
        tokens = self._tokens
        if self._ended:
            return np.zeros(tokens.n_tokens, np.bool_)
        mask = np.unpackbits(self._mask().view(np.uint8), bitorder="little").view(np.bool_)
        allowed = mask[: tokens.n_tokens]
        if not self._names_tokens:
            allowed[tokens.silent] = False
        allowed[tokens.ends] = mask[tokens.end]
        return allowed

    def accept(self, token: int) -> None:
        """Go on by a token.

        Raises:
            GrammarError: it is not allowed here; the place is as it was. Or the grammar takes too long, or too much
                memory, at this place.
        """
        tokens = self._tokens
        token = int(token)
        if self._ended or not 0 <= token < tokens.n_tokens:
            raise GrammarError(f"token {token}: " + ("the reply has ended" if self._ended else "there is none"))
        if token in tokens.end_set:
            if not self.accepting:
                raise GrammarError(f"token {token} ends the reply where the grammar does not")
            self._ended = True
            return
        silent = not tokens.pieces[token] and not self._names_tokens
        if silent or self._native.try_consume_tokens([token]) != 1:
            self._raise_limit(token)
            raise GrammarError(f"token {token} ({tokens.pieces[token]!r}) is not what the grammar goes on with")
        self._begun = True
        self._recent = [*self._recent[-3:], token]

    def accept_text(self, data: bytes) -> bool:
        """Go on by bytes, which need not end where a token does.

        Returns:
            whether they stay in the language; where not, the place is as it was.

        Raises:
            GrammarError: the grammar takes too long, or too much memory, at this place.
        """
        tokens = self._tokens
        ids = [tokens.n_tokens + byte for byte in data]
        # A byte that begins a token's name, and no text.
        if self._ended or 0xFF in data:
            return not ids
        n = self._native.validate_tokens(ids)
        if n < len(ids):
            self._raise_limit(*ids[: n + 1])
            return False
        self._native.try_consume_tokens(ids)
        if ids:
            self._begun = True
            self._recent = []
        return True

    def forced(self) -> list[int]:
        """The tokens that are certain to come next, as the model's tokenizer writes them.

        Returns:
            ids; [] where more than one text, or the end, can come, or where later text may change the first token.
        """
        if self._ended:
            return []
        # On a copy: looking ahead to a token leaves llguidance where it takes the token no more.
        data = self._native.deep_copy().compute_ff_bytes()
        if data.startswith(b"\xff["):
            token = int(data[2 : data.index(b"]")])
            return [] if token in self._tokens.end_set or token >= self._tokens.n_tokens else [token]
        data = data.split(b"\xff", 1)[0]
        return self._tokens.spelling().certain(data, self._recent) if data else []

    @property
    def accepting(self) -> bool:
        """Whether the reply may end here."""
        return self._ended or self._native.is_accepting()

    @property
    def stopped(self) -> bool:
        """Whether nothing but the end can follow."""
        if self._ended or self._native.is_stopped():
            return True
        # llguidance sees an end when it comes there, not where it begins: where the only text is the empty one.
        return (
            not self._begun and self.accepting and int.from_bytes(self._mask().tobytes(), "little").bit_count() == 1
        )

    def _mask(self) -> NDArray[np.uint32]:
        self._native.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._native.is_error():
            self._on_limit()
            raise GrammarError(guidance.message(self._native.get_error()).text)
        return self._bits

    def _raise_limit(self, *tokens: int) -> None:
        """Raise if the last token was refused for a limit that was met; going there tells, and breaks what goes."""
        ahead = self._native.deep_copy()
        ahead.try_consume_tokens(list(tokens[:-1]))
        ahead.consume_token(tokens[-1])
        if guidance.is_limit(ahead.get_error()):
            self._on_limit()
            raise GrammarError(guidance.message(ahead.get_error()).text)


class _Bytes:
    """The vocabulary of all bytes, and no end: enough to read a text."""

    n_tokens = 256
    is_eog = np.zeros(256, np.bool_)

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        return np.frombuffer(source.encode() if isinstance(source, str) else source, np.uint8).astype(np.int32)

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        return bytes(map(int, tokens))


@cache
def _byte_compiler() -> GrammarCompiler:
    return GrammarCompiler(_Bytes())


# A thread that was not forked may have held its lock.
os.register_at_fork(after_in_child=_byte_compiler.cache_clear)


def _written_gbnf(rules: gbnf.Rules, spelled: Callable[[Token], str]) -> str:
    return lexemes.lark(rules.pool, rules.rules, rules.root, spelled)


def _written(kind: str, source: str) -> str:
    """A grammar in llguidance's Lark, where alone it can be told to leave all ways of writing a text open."""
    if kind == "json_schema":
        expression, lines = schemas.written(source)
        return "\n".join([_NO_FORCING, f"start: {expression}", *lines, ""])
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise gbnf.error_at(source, error.start, "a character that no text has") from None
    schemas.check_classes(source)
    if kind == "regex":
        if len(source) > _MAX_PATTERN:
            raise GrammarError(
                f"the regular expression has {len(source)} characters; at most {_MAX_PATTERN} are supported: "
                "use fewer or shorter options"
            )
        quoted = json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]["lark_grammar"]
        return f"{quoted}\n{_NO_FORCING}\n"
    if len(_LARK_RULE.findall(source)) > _MAX_RULES:
        raise GrammarError(f"the grammar has more than {_MAX_RULES} rules")
    options = sum(1 for _ in _OPTION.finditer(source))
    if options > _MAX_OPTIONS:
        raise GrammarError(
            f"the grammar has {options} texts as options of rules; at most {_MAX_OPTIONS} are supported: "
            "write long lists of words as a regular expression"
        )
    return f"{source}\n{_NO_FORCING}\n"


def _names_tokens(grammar: Grammar) -> bool:
    return grammar.written is None or (grammar.kind == "lark" and _LARK_TOKEN.search(grammar.source) is not None)


def _compiled(tokens: guidance.Tokens, grammar: Grammar, written: str) -> LLMatcher:
    if written.count("\n") > 2 * _MAX_RULES:
        raise GrammarError(f"the grammar has more than {2 * _MAX_RULES} rules that cannot be read at once")
    native = guidance.compiled(tokens, written)
    if native.is_error():
        raise _refusal(grammar, native.get_error())
    return native


def _refusal(grammar: Grammar, raw: str) -> GrammarError:
    text, line, column = guidance.message(raw)
    # Only of Lark is what llguidance read what the user wrote.
    if line is None or grammar.kind != "lark":
        return (NotSupported if guidance.is_unsupported(raw) else GrammarError)(text)
    return GrammarError(f"line {line}, column {column}: {text}", line=line, column=column)
