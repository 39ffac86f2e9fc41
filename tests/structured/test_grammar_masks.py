"""Masks of a grammar: exactly the tokens that stay in the language, and the tokens that are forced."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erllama import Grammar, GrammarError
from erllama.engine.backend import Vocabulary
from erllama.engine.backends.stub import StubVocabulary
from erllama.engine.grammar.grammar import GrammarCompiler
from erllama.engine.grammar.matcher import Matcher
from erllama.llama_ffi import LlamaModel
from support.examples import examples
from support.grammar_walks import PERSON
from support.paths import SHARED
from support.threads import in_threads

# --- small vocabularies -----------------------------------------------------------------------


class Pieces:
    """A vocabulary of given pieces, some of which end a reply. It tokenizes by the longest piece that fits."""

    def __init__(self, pieces: Sequence[bytes], ends: Sequence[int] = (), names: Sequence[bytes] = ()) -> None:
        self._pieces, self._names = list(pieces), list(names)
        self.n_tokens = len(pieces)
        self.is_eog = np.isin(np.arange(self.n_tokens), list(ends))

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        raw = source.encode() if isinstance(source, str) else source
        if parse_special and raw in self._names:
            return np.array([self._names.index(raw)], np.int32)
        found = []
        while raw:
            fits = [token for token, piece in enumerate(self._pieces) if piece and raw.startswith(piece)]
            found.append(max(fits, key=lambda token: len(self._pieces[token])))
            raw = raw[len(self._pieces[found[-1]]) :]
        return np.array(found, np.int32)

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        names = [*self._names, *[b""] * self.n_tokens]
        return b"".join(self._pieces[int(token)] or (names[int(token)] if special else b"") for token in tokens)


BYTES = [bytes([byte]) for byte in range(256)]


def spelled(vocabulary: Vocabulary, mask: NDArray[np.bool_]) -> list[bytes]:
    return [vocabulary.piece(token) for token in np.flatnonzero(mask).tolist()]


def test_exactly_the_tokens_that_stay_in_the_language_are_allowed() -> None:
    vocabulary = Pieces([b"a", b"ab", b"ab", b"b", b"abc", b"\xc3", b"\xa9", "é".encode(), b"", b"\xff", b"x"], [8])
    matcher = GrammarCompiler(vocabulary).matcher(Grammar.gbnf('root ::= "ab" | "é" "x"?'))
    assert np.flatnonzero(matcher.allowed()).tolist() == [0, 1, 2, 5, 7]
    matcher.accept(5)
    assert np.flatnonzero(matcher.allowed()).tolist() == [6]
    assert not matcher.accepting
    matcher.accept(6)
    assert np.flatnonzero(matcher.allowed()).tolist() == [8, 10]
    assert (matcher.accepting, matcher.stopped) == (True, False)
    matcher.accept(10)
    assert np.flatnonzero(matcher.allowed()).tolist() == [8]
    assert (matcher.accepting, matcher.stopped) == (True, True)
    matcher.accept(8)
    assert not matcher.allowed().any()
    assert (matcher.accepting, matcher.stopped) == (True, True)
    with pytest.raises(GrammarError, match="has ended"):
        matcher.accept(8)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64])
def test_vocabularies_of_any_size_work_without_end_tokens(n: int) -> None:
    vocabulary = Pieces([b"x"] * n)
    matcher = GrammarCompiler(vocabulary).matcher(Grammar.regex("x{2}"))
    for _ in range(2):
        assert matcher.allowed().tolist() == [True] * n
        matcher.accept(n - 1)
    assert (matcher.allowed().any(), matcher.accepting, matcher.stopped) == (False, True, True)


def test_a_refused_token_changes_nothing() -> None:
    vocabulary = Pieces([b"a", b"b", b"c", b"", b""], [4])
    matcher = GrammarCompiler(vocabulary).matcher(Grammar.regex("ab"))
    matcher.accept(0)
    for wrong in (0, 2, 3, 4, 5, -1):
        with pytest.raises(GrammarError, match=str(wrong)):
            matcher.accept(wrong)
    matcher.accept(1)
    matcher.accept(4)


def test_a_vocabulary_without_the_needed_bytes_has_no_allowed_token() -> None:
    matcher = GrammarCompiler(Pieces([b"a", b""], [1])).matcher(Grammar.regex("ab"))
    matcher.accept(0)
    assert not matcher.allowed().any()
    assert not matcher.accepting


def test_a_grammar_may_accept_only_the_empty_text() -> None:
    for grammar in (Grammar.gbnf('root ::= ""'), Grammar.regex(""), Grammar.gbnf("root ::= [] x\nx ::= | x x")):
        assert grammar.accepts("")
        assert not grammar.accepts("a")
        matcher = GrammarCompiler(Pieces([b"a", b""], [1])).matcher(grammar)
        assert matcher.allowed().tolist() == [False, True]
        assert (matcher.accepting, matcher.stopped) == (True, True)


def test_tokens_without_text_are_allowed_only_by_name() -> None:
    names = [*[b""] * 256, b"<think>", b"</think>", b"<end>", b"<other>"]
    vocabulary = Pieces([*BYTES, b"", b"", b"", b""], [258], names)
    compiler = GrammarCompiler(vocabulary)
    anything = compiler.matcher(Grammar.regex("(?s:.*)"))
    assert np.flatnonzero(anything.allowed()).tolist() == [*range(0x80), *range(0xC2, 0xF5), 258]
    for source in (
        "root ::= <think> thought </think> [a-z]+\nthought ::= !</think>*",
        "root ::= <[256]> !<[257]>* <[257]> [a-z]+",
    ):
        grammar = Grammar.gbnf(source)
        matcher = compiler.matcher(grammar)
        assert matcher.forced() == [256]
        assert np.flatnonzero(matcher.allowed()).tolist() == [256]
        matcher.accept(256)
        assert np.flatnonzero(matcher.allowed()).tolist() == [token for token in range(260) if token != 258]
        for token in (*b"so </think>", 0xFF, 259, 257):
            matcher.accept(token)
        assert np.flatnonzero(matcher.allowed()).tolist() == list(b"abcdefghijklmnopqrstuvwxyz")
        with pytest.raises(GrammarError, match="vocabulary"):
            grammar.accepts("a")
    lark = compiler.matcher(Grammar.lark('start: <think> "a" </think>'))
    for token in (256, ord("a"), 257):
        assert np.flatnonzero(lark.allowed()).tolist() == [token]
        lark.accept(token)
    assert lark.stopped


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ('root ::=\n "a" <nothing>', "line 2, column 6: <nothing> is 9 tokens"),
        ("root ::= <[400]>", "outside the vocabulary of 257 tokens"),
        ("root ::= <[256]>", "ends a reply"),
    ],
)
def test_an_unknown_token_in_a_grammar_is_refused_on_use(source: str, problem: str) -> None:
    grammar = Grammar.gbnf(source)
    with pytest.raises(GrammarError, match=re.escape(problem)):
        GrammarCompiler(Pieces([*BYTES, b""], [256])).matcher(grammar)


def test_characters_may_span_several_tokens() -> None:
    vocabulary = Pieces([b"hel", b"lo wor", b"ld", b"", *BYTES], [3])
    compiler = GrammarCompiler(vocabulary)
    matcher = compiler.matcher(Grammar.gbnf('root ::= "hello " [a-zé]+'))
    assert matcher.accept_text(b"hello w\xc3")
    assert not matcher.accept_text(b"x")
    assert not matcher.accept_text(b"\xff")
    assert not matcher.accept_text(b"\xa9rld!")
    assert matcher.accept_text(b"")
    assert matcher.accept_text(b"\xa9r")
    matcher.accept(2)
    assert matcher.accepting
    assert not matcher.accept_text(b" ")


def test_one_compiler_serves_many_threads() -> None:
    compiler = GrammarCompiler(StubVocabulary())

    def work(number: int) -> None:
        grammar = Grammar.regex(f"(ab){{{number % 3 + 1}}}")
        for _ in range(30):
            matcher = compiler.matcher(grammar)
            for byte in b"ab" * (number % 3 + 1):
                assert np.flatnonzero(matcher.allowed()).tolist() == [byte]
                matcher.accept(byte)
            assert matcher.stopped

    in_threads(work, 8)


def test_grammars_beyond_the_compiler_cache_are_recompiled() -> None:
    compiler = GrammarCompiler(StubVocabulary())
    for _ in range(2):
        for n in range(1, 80):
            matcher = compiler.matcher(Grammar.regex(f"a{{{n}}}"))
            assert matcher.accept_text(b"a" * n)
            assert matcher.stopped
    assert len(compiler._compiled) == 64


# --- real vocabularies ------------------------------------------------------------------------

NAMES = ["qwen2", "llama-bpe", "llama-spm"]


@cache
def compiler_of(name: str) -> tuple[LlamaModel, GrammarCompiler]:
    path = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    model = LlamaModel(path, vocab_only=True)
    return model, GrammarCompiler(model.vocabulary)


@pytest.fixture(params=[*NAMES, "bytes"])
def vocabulary(request: pytest.FixtureRequest) -> tuple[Vocabulary, GrammarCompiler]:
    if request.param == "bytes":
        stub = StubVocabulary()
        return stub, GrammarCompiler(stub)
    model, compiler = compiler_of(request.param)
    return model.vocabulary, compiler


def walked(vocabulary: Vocabulary, matcher: Matcher, rng: random.Random, most: int = 400) -> Iterator[int]:
    """Return the tokens of a random reply, which ends early where it can and has a maximum length."""
    for _ in range(most):
        mask = matcher.allowed()
        ends = np.flatnonzero(mask & vocabulary.is_eog)
        assert bool(len(ends)) == matcher.accepting
        tokens = np.flatnonzero(mask & ~vocabulary.is_eog)
        assert (len(tokens) == 0) == matcher.stopped
        if len(ends) and (not len(tokens) or rng.random() < 0.2):
            matcher.accept(int(rng.choice(ends)))
            return
        # Short tokens as often as long ones, which are more numerous.
        token = min(rng.choices(tokens.tolist(), k=rng.randint(1, 4)), key=lambda id: len(vocabulary.piece(id)))
        matcher.accept(token)
        yield token
    pytest.fail("the reply did not end")


def is_sum(text: str) -> bool:
    while "(" in text:
        shorter = re.sub(r"\(([0-9]+|x)([-+]([0-9]+|x))*\)", "x", text)
        if shorter == text:
            return False
        text = shorter
    return re.fullmatch(r"([0-9]+|x)([-+]([0-9]+|x))*", text) is not None


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


REPLIES: dict[str, tuple[Grammar, Callable[[str], object]]] = {
    "schema": (Grammar.json_schema(PERSON), is_person),
    "regex": (
        Grammar.regex(r"[A-Z][a-zé]{1,9}( [a-z]{1,6}){0,5}[.!]"),
        lambda text: re.fullmatch(r"[A-Z][a-zé]{1,9}( [a-z]{1,6}){0,5}[.!]", text),
    ),
    "sum": (
        Grammar.gbnf('root ::= term ([-+] term){0,3}\nterm ::= [0-9]{1,4} | "(" root ")"'),
        is_sum,
    ),
    "lines": (
        Grammar.gbnf('root ::= ("- " [^\\n\\x00-\\x1f]{1,20} "\\n"){1,4}'),
        lambda text: re.fullmatch("(- [^\x00-\x1f]{1,20}\n){1,4}", text),
    ),
    "record": (
        Grammar.gbnf(
            'root ::= "temperature: " [0-9]{1,3} " degrees, " ("humidity: " [0-9]{1,2} "%" | "nothing else")'
        ),
        lambda text: re.fullmatch("temperature: [0-9]{1,3} degrees, (humidity: [0-9]{1,2}%|nothing else)", text),
    ),
    "words": (
        Grammar.lark('start: (WORD " "){1,4} "the end"\nWORD: /[a-z]{1,6}/ & ~/.*x.*/\n'),
        lambda text: re.fullmatch("([a-wyz]{1,6} ){1,4}the end", text),
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_every_random_reply_is_in_the_language(vocabulary: tuple[Vocabulary, GrammarCompiler], name: str) -> None:
    tokens, compiler = vocabulary
    grammar, checked = REPLIES[name]
    for seed in range(8):
        reply = list(walked(tokens, compiler.matcher(grammar), random.Random(seed), 3000))
        text = b"".join(map(tokens.piece, reply))
        assert checked(text.decode()), text
        assert grammar.accepts(text)


@pytest.mark.parametrize("name", REPLIES)
def test_exactly_the_allowed_tokens_can_be_accepted(
    vocabulary: tuple[Vocabulary, GrammarCompiler], name: str
) -> None:
    tokens, compiler = vocabulary
    grammar, _ = REPLIES[name]
    rng = random.Random(name)
    reply = list(walked(tokens, compiler.matcher(grammar), rng, 3000))
    for at in rng.sample(range(len(reply) + 1), min(4, len(reply) + 1)):

        def there(at: int = at) -> Matcher:
            matcher = compiler.matcher(grammar)
            for token in reply[:at]:
                matcher.accept(token)
            return matcher

        mask = there().allowed().copy()
        allowed, refused = np.flatnonzero(mask).tolist(), np.flatnonzero(~mask).tolist()
        for token in rng.sample(allowed, min(20, len(allowed))):
            there().accept(token)
            piece = tokens.piece(token)
            assert tokens.is_eog[token] or there().accept_text(piece)
        matcher = there()
        for token in rng.sample(refused, min(100, len(refused))):
            with pytest.raises(GrammarError):
                matcher.accept(token)
        assert (matcher.allowed() == mask).all()


@pytest.mark.parametrize("name", ["schema", "record"])
def test_forced_tokens_are_allowed_one_after_another(
    vocabulary: tuple[Vocabulary, GrammarCompiler], name: str
) -> None:
    tokens, compiler = vocabulary
    grammar, _ = REPLIES[name]
    seen = 0
    for seed in range(4):
        matcher, rng = compiler.matcher(grammar), random.Random(seed)
        for _ in range(200):
            certain = matcher._native.deep_copy().compute_ff_bytes()
            forced = matcher.forced()
            assert certain.startswith(b"".join(map(tokens.piece, forced)))
            for token in forced:
                assert matcher.allowed()[token]
                assert not tokens.is_eog[token]
                matcher.accept(token)
                seen += 1
            choice = np.flatnonzero(matcher.allowed()).tolist()
            token = rng.choice(choice)
            matcher.accept(token)
            if tokens.is_eog[token]:
                break
    assert seen > 10


WORDS = st.lists(
    st.sampled_from(
        [
            "hello",
            " world",
            "  ",
            "\n",
            '{"name": ',
            "12",
            "3",
            " 1",
            "é",
            "😀",
            "日本",
            ".",
            "...",
            "ing",
            "th",
            "\t",
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(35), deadline=None)
@given(text=WORDS, later=WORDS)
def test_forced_tokens_match_the_tokenizer_for_every_continuation(name: str, text: str, later: str) -> None:
    model, compiler = compiler_of(name)
    vocabulary = model.vocabulary
    literal = "".join(f"\\U{ord(letter):08x}" for letter in text)
    forced = compiler.matcher(Grammar.gbnf(f'root ::= "{literal}" .*')).forced()
    # If a tokenizer puts a space first, a part of a text is tokenized as a text after a newline.
    fence = vocabulary.tokenize("\x02", add_special=False) if name == "llama-spm" else []
    whole = vocabulary.tokenize("\x02" * bool(len(fence)) + text + later, add_special=False).tolist()[len(fence) :]
    assert forced == whole[: len(forced)]


@pytest.mark.parametrize("name", NAMES)
def test_most_of_a_certain_text_is_forced_at_once(name: str) -> None:
    _, compiler = compiler_of(name)
    text = '{"temperature": {"unit": "celsius", "description": "how warm it is"}}'
    matcher = compiler.matcher(Grammar.json_schema({"const": text}))
    forced = matcher.forced()
    assert len(b"".join(compiler._vocabulary.piece(token) for token in forced)) > len(text) - 8
    for token in forced:
        matcher.accept(token)
