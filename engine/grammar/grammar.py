"""Grammars as values, checked when made, and their compilation for a vocabulary.

A `Grammar` is a value that any model can use. A `GrammarCompiler` belongs to a vocabulary, compiles each grammar
once and makes a `Matcher` for each reply. llguidance (https://github.com/guidance-ai/llguidance) compiles.
`engine.grammar.gbnf` and `engine.grammar.lark_writer` translate GBNF, `engine.grammar.schemas` translates JSON
schemas.
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
from erllama.engine.grammar import gbnf, lark_writer, llguidance_adapter
from erllama.engine.grammar.expressions import TokenReference
from erllama.engine.grammar.matcher import Matcher
from erllama.engine.grammar.schemas import json_schema
from erllama.engine.grammar.unsupported import NotSupported
from erllama.errors import GrammarError

# Characters of a grammar. A longer one is a mistake of a generator, and would exhaust the stack of the compiler.
_MAX_SOURCE = 4 << 20
# Compiled grammars that are kept. Each takes some kB to some MB, growing with use.
_MAX_COMPILED = 64
_MAX_RULES = 5000
# Bytes that llguidance looks ahead. A grammar that forces them all never ends in practice.
_MAX_FORCED = 100_000
_NO_FORCING = '%llguidance {"no_forcing": true}'
_LARK_RULE = re.compile(r"(?m)^[ \t]*[?!]?[A-Za-z_][\w-]*[^:\n]{0,200}:")
# A token, such as <|name|> or <[12]>, or the same text in a string.
_LARK_TOKEN = re.compile(r"<[^<>\s]+>")
# Characters of a regular expression. Longer ones take seconds, and then are too large for llguidance.
_MAX_PATTERN = 1 << 20
# Texts as options of Lark rules. Their time grows with their square.
_MAX_OPTIONS = 20_000
_OPTION = re.compile(r'\|\s*"')
_KINDS = ("gbnf", "json_schema", "regex", "lark")


@dataclass(frozen=True, slots=True)
class Grammar:
    """The language of a whole reply, made by one of the class methods. Hashable; compares by kind, source and root.

    Attributes:
        kind: "gbnf", "json_schema", "regex" or "lark".
        source: the grammar's text.
        root: the rule of GBNF that a reply matches.
    """

    kind: str
    source: str
    root: str = "root"
    # The text that llguidance compiles; None if it depends on the vocabulary, because the grammar refers to tokens.
    lark_source: str | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def gbnf(cls, text: str, root: str = "root") -> Grammar:
        """Return a grammar in GBNF, as llama.cpp reads it (see `engine.grammar.gbnf` for the differences).

        References to tokens, such as `<[1234]>`, `<|name|>` and `!<|name|>`, are resolved when a model uses the
        grammar. If a token matches both a text and a reference, the reference applies.

        Raises:
            GrammarError: the text is not valid GBNF, or a rule has no finite text; with line and column.
        """
        return cls("gbnf", text, root)

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | bool | str) -> Grammar:
        """Return a grammar for JSON that matches a schema (draft 2020-12, as far as llguidance supports it).

        Properties appear in the order in which the schema lists them. Between the parts of the JSON, one space is
        allowed, or a new line with up to 40 spaces or tabs, so that a model cannot write endless white space.
        Strings contain their characters literally; \\u is for control characters only. The schema's `x-guidance`,
        which would change such settings of the compiler, is ignored. A `format` that llguidance does not know is an
        annotation, and is ignored, too.

        Args:
            schema: a mapping, True for any JSON, or JSON text.

        Raises:
            GrammarError: the text is not JSON, with line and column; or a keyword is not supported or contradicts
                another one. The message names it.
        """
        return cls("json_schema", json_schema.to_source(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Return a grammar for any JSON object, with white space as in `json_schema`."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Return a grammar for text that a regular expression matches as a whole.

        The syntax is that of Rust's regex crate: no lookaround, no back references; `.` does not match a new line.

        Raises:
            GrammarError: the pattern is not valid; with the column in the pattern.
        """
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return a grammar in Lark, as llguidance reads it (its docs/syntax.md).

        A lexer takes the longest match of each terminal. So `/[a-z]+/ "x"` has no text, unlike in GBNF.

        Raises:
            GrammarError: the text is not valid Lark; with line and column.
        """
        return cls("lark", text)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS or not isinstance(self.source, str) or not isinstance(self.root, str):
            raise GrammarError(f"a grammar needs a text and one of the kinds {', '.join(_KINDS)}")
        if len(self.source) > _MAX_SOURCE:
            raise GrammarError(f"a grammar of {len(self.source)} characters; at most {_MAX_SOURCE} are supported")
        if self.kind == "gbnf":
            rules = gbnf.parse(self.source, self.root)
            checked = _gbnf_to_lark(rules, lambda token: "<[0]>")
            object.__setattr__(self, "lark_source", None if rules.tokens else checked)
        else:
            checked = _to_lark(self.kind, self.source)
            object.__setattr__(self, "lark_source", checked)
        if self.kind == "lark" and _LARK_TOKEN.search(self.source):
            # Names and numbers of tokens need a vocabulary. The rest is checked without one.
            problem = llguidance_adapter.validate(checked)
            if problem:
                raise _error_of(self, problem)
        else:
            _byte_compiler().check(self, checked)

    def accepts(self, text: str | bytes) -> bool:
        """Return whether a whole text is in the language. Needs no model.

        Raises:
            GrammarError: the grammar refers to tokens, so it needs a vocabulary; or matching takes too long.
        """
        if self.lark_source is None:
            raise GrammarError("the grammar refers to tokens, so it needs a model's vocabulary to match a text")
        matcher = _byte_compiler().matcher(self)
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        return matcher.accept_text(raw) and matcher.accepting


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Thread-safe, and cheap to make.

    The first grammar takes longer, since it also builds a trie of the vocabulary's tokens, in the calling thread.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokens: llguidance_adapter.GuidanceVocabulary | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return a matcher in the initial state of a grammar.

        Raises:
            GrammarError: the grammar refers to a token that the vocabulary lacks, or is too large to compile.
        """
        with self._lock:
            tokens = self._guidance_vocabulary()
            compiled = self._compiled.get(grammar)
            if compiled is None:
                compiled = _compile(tokens, grammar, self._to_lark(grammar))
                self._keep(grammar, compiled)
            self._compiled.move_to_end(grammar)
            names_tokens = _names_tokens(grammar)
            return Matcher(tokens, compiled.deep_copy(), lambda: self._forget(grammar), names_tokens=names_tokens)

    def check(self, grammar: Grammar, lark_source: str) -> None:
        """Raise GrammarError if the Lark text of a grammar does not compile, or has no finite text."""
        with self._lock:
            tokens = self._guidance_vocabulary()
            compiled = _compile(tokens, grammar, lark_source)
            matcher = Matcher(tokens, compiled.deep_copy(), lambda: None, names_tokens=True)
            if not matcher.allowed().any() and not matcher.accepting:
                raise GrammarError(llguidance_adapter.NO_CONTINUATION)
            if len(compiled.deep_copy().compute_ff_bytes()) >= _MAX_FORCED:
                raise GrammarError(f"the grammar has no text of at most {_MAX_FORCED} bytes")
            if grammar.lark_source is not None:
                self._keep(grammar, compiled)

    def _keep(self, grammar: Grammar, compiled: LLMatcher) -> None:
        self._compiled[grammar] = compiled
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)

    def _forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._compiled.pop(grammar, None)

    def _guidance_vocabulary(self) -> llguidance_adapter.GuidanceVocabulary:
        if self._tokens is None:
            self._tokens = llguidance_adapter.GuidanceVocabulary(self._vocabulary)
        return self._tokens

    def _to_lark(self, grammar: Grammar) -> str:
        if grammar.lark_source is not None:
            return grammar.lark_source
        rules = gbnf.parse(grammar.source, grammar.root)
        return _gbnf_to_lark(rules, lambda token: self._reference(token, grammar.source))

    def _reference(self, token: TokenReference, source: str) -> str:
        """Return a token reference in Lark. A grammar cannot refer to tokens that end a reply."""
        vocabulary = self._vocabulary
        id = token.id
        if id is None:
            ids = vocabulary.tokenize(token.name, add_special=False, parse_special=True).tolist()
            if len(ids) != 1:
                raise gbnf.error_at(
                    source, token.offset, f"{token.name} is {len(ids)} tokens of this model, not one"
                )
            id = ids[0]
        if id >= vocabulary.n_tokens:
            raise gbnf.error_at(
                source, token.offset, f"token {id} is outside the vocabulary of {vocabulary.n_tokens} tokens"
            )
        if not token.negated:
            if vocabulary.is_eog[id]:
                raise gbnf.error_at(
                    source,
                    token.offset,
                    f"token {id} ends a reply; leave it out: the reply ends where the grammar ends",
                )
            return f"<[{id}]>"
        wanted = ~np.asarray(vocabulary.is_eog, bool)
        wanted[id] = False
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
        ranges = ",".join(f"{low}-{high - 1}" for low, high in zip(edges[::2], edges[1::2], strict=True))
        return f"<[{ranges}]>"


class _ByteVocabulary:
    """A vocabulary of single bytes without an end token. It is enough to match a text without a model."""

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
    return GrammarCompiler(_ByteVocabulary())


# Another thread may have held its lock at the fork.
os.register_at_fork(after_in_child=_byte_compiler.cache_clear)


def _gbnf_to_lark(rules: gbnf.ParsedGrammar, format_token: Callable[[TokenReference], str]) -> str:
    return lark_writer.write_lark(rules.pool, rules.rules, rules.root, format_token)


def _to_lark(kind: str, source: str) -> str:
    """Return a grammar in llguidance's Lark.

    Only there can `no_forcing` be set, which keeps all spellings of a text allowed.
    """
    if kind == "json_schema":
        expression, lines = json_schema.to_lark(source)
        return "\n".join([_NO_FORCING, f"start: {expression}", *lines, ""])
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise gbnf.error_at(source, error.start, "a surrogate character, which no text contains") from None
    json_schema.check_classes(source)
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
    return grammar.lark_source is None or (
        grammar.kind == "lark" and _LARK_TOKEN.search(grammar.source) is not None
    )


def _compile(tokens: llguidance_adapter.GuidanceVocabulary, grammar: Grammar, lark_source: str) -> LLMatcher:
    if lark_source.count("\n") > 2 * _MAX_RULES:
        raise GrammarError(f"the grammar takes more than {2 * _MAX_RULES} rules in Lark; use fewer recursive rules")
    native = llguidance_adapter.compile_grammar(tokens, lark_source)
    if native.is_error():
        raise _error_of(grammar, native.get_error())
    return native


def _error_of(grammar: Grammar, raw: str) -> GrammarError:
    text, line, column = llguidance_adapter.describe_error(raw)
    # Line and column refer to the Lark text, so they are useful only for a grammar written in Lark.
    if line is None or grammar.kind != "lark":
        return (NotSupported if llguidance_adapter.is_unsupported(raw) else GrammarError)(text)
    return GrammarError(f"line {line}, column {column}: {text}", line=line, column=column)
