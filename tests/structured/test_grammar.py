"""Grammars accept exactly their language, and errors name the position."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TypeVar

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from erllama import Error, Grammar, GrammarError
from erllama.engine.backends.stub import StubVocabulary
from erllama.engine.grammar import adjacency, automata, gbnf, lark_writer
from erllama.engine.grammar.grammar import GrammarCompiler
from support.examples import examples
from support.grammar_walks import PERSON

# --- GBNF is its language, no more and no less ------------------------------------------------

T = TypeVar("T")
# An expression: a set of letters, a text, a rule, or a combination of others.
Expression = tuple[object, ...]
TEXTS = ["".join(letters) for n in range(5) for letters in product("abc", repeat=n)]


def made_or_refused(make: Callable[[], T], problem: str = "") -> T | None:
    """Return the grammar, or None if it is refused with a short message and for an expected reason."""
    refused: list[str] = []
    try:
        return make()
    except GrammarError as error:
        refused.append(str(error))
    assert problem in refused[0]
    assert len(refused[0]) < 500
    assert "\n" not in refused[0]
    return None


def expressions(rules: int) -> st.SearchStrategy[Expression]:
    leaves = st.one_of(
        st.tuples(st.just("set"), st.sets(st.sampled_from("abc"), min_size=1).map(frozenset), st.booleans()),
        st.tuples(st.just("text"), st.text("abc", max_size=3)),
        st.tuples(st.just("rule"), st.integers(0, rules - 1)),
    )
    bounds = st.sampled_from([(0, 1), (0, None), (1, None), (2, 2), (1, 3), (0, 2), (2, None), (0, 0)])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(st.just("sequence"), st.lists(inner, max_size=3).map(tuple)),
            st.tuples(st.just("choice"), st.lists(inner, min_size=1, max_size=3).map(tuple)),
            st.tuples(st.just("repeat"), inner, bounds),
        ),
        max_leaves=6,
    )


grammars = st.integers(1, 4).flatmap(lambda n: st.lists(expressions(n), min_size=n, max_size=n))


def written(expression: Expression) -> str:
    kind, *parts = expression
    if kind == "set":
        letters, negated = parts
        # The complement within abc. Other characters do not occur in the tried texts.
        others = "".join(sorted(set("abc") - letters))
        return f"[^{others}]" if negated and others else f"[{''.join(sorted(letters))}]"
    if kind == "text":
        return f'"{parts[0]}"'
    if kind == "rule":
        return f"r{parts[0]}"
    if kind == "sequence":
        return "(" + " ".join(map(written, parts[0])) + ")"
    if kind == "choice":
        return "(" + " | ".join(map(written, parts[0])) + ")"
    least, most = parts[1]
    return f"({written(parts[0])}){{{least},{'' if most is None else most}}}"


class Reference:
    """Return the spans of a text that match each expression, extended until no more are found."""

    def __init__(self, rules: Sequence[Expression], text: str) -> None:
        self.rules, self.text = rules, text
        self.here = {(i, i) for i in range(len(text) + 1)}
        self.known: list[set[tuple[int, int]]] = [set() for _ in rules]

    def accepts(self) -> bool:
        while True:
            new = [self.spans(rule) for rule in self.rules]
            if new == self.known:
                return (0, len(self.text)) in self.known[0]
            self.known = new

    def spans(self, expression: Expression) -> set[tuple[int, int]]:
        kind, *parts = expression
        if kind == "set":
            return {(i, i + 1) for i, letter in enumerate(self.text) if letter in parts[0]}
        if kind == "text":
            return {(i, i + len(parts[0])) for i, _ in self.here if self.text.startswith(parts[0], i)}
        if kind == "rule":
            return self.known[parts[0]]
        if kind == "choice":
            return set().union(*map(self.spans, parts[0]))
        if kind == "sequence":
            return self.chained([self.spans(part) for part in parts[0]])
        one = self.spans(parts[0])
        least, most = parts[1]
        # More repetitions than letters repeat an empty text.
        counts = range(least, (max(least, len(self.text) + 1) if most is None else most) + 1)
        return set().union(*(self.chained([one] * n) for n in counts))

    def chained(self, parts: list[set[tuple[int, int]]]) -> set[tuple[int, int]]:
        spans = self.here
        for part in parts:
            spans = {(i, end) for i, j in spans for start, end in part if start == j}
        return spans


@settings(max_examples=examples(25), deadline=None)
@given(grammars)
def test_gbnf_accepts_the_texts_that_its_rules_derive(rules: list[Expression]) -> None:
    source = "root ::= r0\n" + "".join(f"r{at} ::= {written(rule)}\n" for at, rule in enumerate(rules))
    grammar = made_or_refused(lambda: Grammar.gbnf(source), "has no finite text")
    assume(grammar is not None)
    for tried in TEXTS:
        assert grammar is None or grammar.accepts(tried) == Reference(rules, tried).accepts(), (source, tried)


def one_of(letters: str) -> Expression:
    return ("set", frozenset(letters), False)


def text(letters: str) -> Expression:
    return ("text", letters)


def sequence(*parts: Expression) -> Expression:
    return ("sequence", parts)


def choice(*options: Expression) -> Expression:
    return ("choice", options)


def repeat(part: Expression, least: int, most: int | None = None) -> Expression:
    return ("repeat", part, (least, most))


ROOT, ONE, TWO = ("rule", 0), ("rule", 1), ("rule", 2)
# Each would be wrong if a terminal were read further than the rules allow.
TRAPS: list[list[Expression]] = [
    [sequence(repeat(one_of("abc"), 1), text("a"))],
    [sequence(repeat(text("a"), 0), text("ab"))],
    [sequence(choice(text("ab"), text("a")), text("bc"))],
    [choice(sequence(text("a"), ROOT, text("a")), sequence(repeat(one_of("abc"), 1), text("b")))],
    [choice(sequence(text("ab"), ROOT, text("c")), sequence(text("a"), ROOT, text("bc")), text("abc"))],
    [choice(sequence(ONE, ROOT, TWO), text("")), repeat(text("a"), 1), sequence(repeat(text("a"), 0), text("b"))],
    [choice(sequence(ROOT, text("b")), sequence(text("a"), ROOT), text("c"))],
    [choice(sequence(repeat(text("a"), 1, 2), ROOT, repeat(text("a"), 1, 2)), repeat(text("b"), 0, 1))],
    [choice(sequence(text("a"), ROOT, text("c")), sequence(text("b"), ROOT, text("b")), text("ab"), text("abb"))],
    [choice(sequence(ROOT, ROOT), sequence(text("a"), ROOT, text("b")), repeat(text("ab"), 1), text(""))],
    [choice(sequence(ONE, ROOT, TWO), text("")), one_of("ab"), one_of("bc")],
]


@pytest.mark.parametrize("letters", ["abc", "aéè"], ids=["bytes", "characters of two bytes"])
@pytest.mark.parametrize("number", range(len(TRAPS)))
def test_terminals_are_not_read_further_than_the_rules_allow(number: int, letters: str) -> None:
    source = "root ::= r0\n" + "".join(f"r{at} ::= {written(rule)}\n" for at, rule in enumerate(TRAPS[number]))
    grammar = Grammar.gbnf(source.translate(str.maketrans("abc", letters)) if letters != "abc" else source)
    for tried in ("".join(some) for n in range(6) for some in product("abc", repeat=n)):
        expected = Reference(TRAPS[number], tried).accepts()
        assert grammar.accepts(tried.translate(str.maketrans("abc", letters))) == expected, tried


def test_gbnf_is_parsed_as_in_llama_cpp() -> None:
    cases: list[tuple[str, list[str], list[str]]] = [
        (r'root ::= "\x41\u00e9\U0001F600\t\r\n\\\"\[\]"', ['Aé😀\t\r\n\\"[]'], ["A"]),
        ("root ::= [a-c-]", ["a", "c", "-"], ["d", ""]),
        ("root ::= [-a]", ["-", "a"], ["b"]),
        (r"root ::= [^\]\\a-c]", ["d", "é", "\n"], ["]", "\\", "b", "dd"]),
        ("root ::= [^é]", ["è", "e", "😀"], ["é", ""]),
        ("root ::= .", ["a", "\n", "😀", "\0"], ["", "ab"]),
        ('root ::= [] "a" [^]', ["a"], ["", "^a"]),
        ('root ::= "a" | [z-a]', ["a"], ["z"]),
        ('root ::= "ab"{2}', ["abab"], ["abb", "ab"]),
        ('root ::= "a"{2}{3}', ["aaaaaa"], ["aaaaa"]),
        ('root ::= "a"{ 1 , 2 } "b"{0,2} "c"{2,}', ["acc", "aabbccc"], ["c", "abbbcc", "ac"]),
        ('root ::= "a" *', ["", "aa"], ["b"]),
        ('root ::= ("a"\n | # one\n "b" # two\n)+ "c" # three\n', ["abac", "bc"], ["c"]),
        ('root ::= "a" |\n  "b" |\n', ["a", "b", ""], ["ab"]),
        ('root ::=\n "a"\r\nunused ::= "b"\rroot ::= "c"', ["c"], ["a"]),
        ("root::=Rule-1\nRule-1::=[0-9]+", ["12"], ["", "x"]),
        ('root ::= "x" | root "y" | "z" root', ["x", "xyy", "zzxy"], ["y", "yx"]),
    ]
    for source, accepted, refused in cases:
        grammar = Grammar.gbnf(source)
        assert [text for text in accepted if not grammar.accepts(text)] == [], source
        assert [text for text in refused if grammar.accepts(text)] == [], source
    assert Grammar.gbnf("a ::= b\nb ::= [0-9]", root="a").accepts("7")


@pytest.mark.parametrize(
    ("source", "line", "column", "problem"),
    [
        ("", None, None, "empty"),
        ("# nothing\n", None, None, "empty"),
        ('a ::= "x"', None, None, "no rule 'root'; it has 'a'"),
        ('root ::= "a" x', 1, 14, "there is no rule 'x'"),
        ('root = "a"', 1, 6, "expected ::="),
        ('root ::= "a"\n\n  x_y ::= "b"', 3, 4, "expected ::="),
        ('root ::= "a" "b"\n | "c"', 2, 2, "the name of a rule"),
        ('root ::= "a', 1, 10, "never closed"),
        ("root ::= [a", 1, 10, "never closed"),
        ('root ::= ("a"', 1, 10, "never closed"),
        ('root ::= "a")', 1, 13, "expected a new line"),
        ('root ::= "\\q"', 1, 11, "escape"),
        ('root ::= "\\x4"', 1, 11, "2 hexadecimal"),
        ('root ::= "\\ud83d"', 1, 11, "not a character"),
        ("root ::= *", 1, 10, "no element before it"),
        ('root ::= "a" | +', 1, 16, "no element before it"),
        ('root ::= "a"{2001}', 1, 13, "at most 2000"),
        ('root ::= "a"{0,2001}', 1, 13, "at most 2000"),
        ('root ::= "a"{9' + "9" * 9000 + "}", 1, 13, "at most 2000"),
        ('root ::= "a"{3,2}', 1, 13, "at least 3"),
        ('root ::= "a"{,2}', 1, 14, "a number"),
        ('root ::= "a"{2;}', 1, 15, "'}'"),
        ("root ::= <12>x <a", 1, 16, "a token"),
        ("root ::= root", 1, 1, "rule 'root' has no finite text"),
        ('root ::= "a" root', 1, 1, "rule 'root' has no finite text"),
        ('root ::= "a" | x\nx ::= y\ny ::= "(" x ")"', 2, 1, "rule 'x' has no finite text"),
        ("root ::= [z-a]", 1, 1, "has no finite text"),
        ('root ::= "\0"', 1, 11, "no text contains"),
        ("root ::= " + "(" * 10_000, 1, 110, "nested too deeply"),
        ("root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000, 1, 110, "nested too deeply"),
    ],
)
def test_invalid_gbnf_is_refused_with_its_position(
    source: str, line: int | None, column: int | None, problem: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(problem)) as caught:
        Grammar.gbnf(source)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert line is None or f"line {line}, column {column}" in str(caught.value)
    assert isinstance(caught.value, Error)
    assert isinstance(caught.value, ValueError)


def test_an_unused_rule_may_be_endless() -> None:
    assert Grammar.gbnf('root ::= "a"\nunused ::= unused').accepts("a")


def test_the_grammars_of_llama_cpp_are_accepted() -> None:
    """Return a grammar as large as converted schemas: recursive, with optional white space."""
    grammar = Grammar.gbnf(
        r"""
        root   ::= object
        value  ::= object | array | string | number | ("true" | "false" | "null") ws
        object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
        array  ::= "[" ws ( value ("," ws value)* )? "]" ws
        string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
        number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
        ws     ::= | " " | "\n" [ \t]{0,20}
        """.replace("\n        ", "\n")
    )
    deep: object = {"a": [1, -2.5e7, 'x\\"y\né', None, True, {}], "": []}
    for _ in range(20):
        deep = {"more": [deep]}
    assert grammar.accepts(json.dumps(deep))
    assert grammar.accepts(json.dumps(deep, separators=(",", ":")))
    for wrong in ('{"a":1', '{"a" 1}', "{'a':1}", '{"a":01}', '{"a":1,}', "[1]", '{"a":"\n"}'):
        assert not grammar.accepts(wrong)


HOSTILE = [
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(10_000)) + 'r10000 ::= "a"',
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60 ::= "a"',
    "root ::= r0\n" + "".join(f'r{i} ::= "x" r{i + 1} "y" r{i} | "u"\n' for i in range(1000)) + 'r1000 ::= "a"',
    "root ::= " + "(" * 90 + '"a"{0,2}' + "){0,2}" * 90,
    "root ::= " + "(" * 99 + '"a" root? "b"' + ")*" * 99,
    "root ::= " + '"a"? ' * 3000,
    'root ::= x root y | "z"\nx ::= ' + " | ".join(f'"w{i}"' for i in range(3000)) + "\ny ::= [a-z0-9]+ x",
    'root ::= "' + "a" * 100_000 + '"',
    'root ::= "a"' + "*" * 20_000,
    "root ::= [" + "".join(map(chr, range(0x4E00, 0x9000, 2))) + '] root "x" | "y"',
    'root ::= ("a"{0,1000} "b"){0,1000} root "c" | "d"',
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_no_grammar_is_slow_or_ends_the_process(number: int) -> None:
    assert made_or_refused(lambda: Grammar.gbnf(HOSTILE[number]).accepts("aaaab")) in (False, None)


def optional_rules(n: int) -> str:
    return "root ::= r0\n" + "".join(f'r{i} ::= "a"? r{i + 1}\n' for i in range(n)) + f'r{n} ::= "z"'


def doubled_rules(n: int) -> str:
    return "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1}? "a" r{i + 1}\n' for i in range(n)) + f'r{n} ::= "z"'


def class_of(n: int) -> str:
    return "root ::= [" + "".join(chr(0x4E00 + i % 5000) for i in range(n)) + "]"


def list_of_words(n: int) -> str:
    return "root ::= " + " | ".join(f'"w{i * 7919 % 1_000_003}"' for i in range(n))


@pytest.mark.parametrize(
    ("made", "n"),
    [(optional_rules, 1200), (class_of, 100_000), (list_of_words, 1500)],
    ids=lambda made: str(made)[:20],
)
def test_the_steps_of_a_grammar_grow_with_its_size(made: Callable[[int], str], n: int) -> None:
    def steps(source: str) -> int:
        rules = gbnf.parse(source)
        lark_writer.write_lark(rules.pool, rules.rules, rules.root, str)
        return rules.pool.work

    assert steps(made(2 * n)) < 3 * steps(made(n))


def test_walks_of_automata_stop_at_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def counted(bits: int, start: int = 0) -> Iterator[int]:
        nonlocal seen
        for member in members(bits, start):
            seen += 1
            yield member

    members = automata.members
    monkeypatch.setattr(automata, "members", counted)
    monkeypatch.setattr(automata, "_MAX_STEPS", 20_000)
    assert Grammar.gbnf(doubled_rules(100)).accepts("az" * 2) is False
    assert seen < 200_000


def test_adjacent_terminals_are_counted_before_they_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def counted(bits: int, start: int = 0) -> Iterator[int]:
        nonlocal seen
        for member in automata.members(bits, start):
            seen += 1
            yield member

    monkeypatch.setattr(adjacency, "members", counted)
    n = 1800
    source = "root ::= " + " ".join(f"a{i}?" for i in range(n)) + "\n"
    source += "".join(f'a{i} ::= "{i}"\n' for i in range(n))
    rules = gbnf.parse(source)
    assert lark_writer.write_lark(rules.pool, rules.rules, rules.root, str)
    # Of n terminals, each of which may be followed by all after it, there are n * n / 2 pairs.
    assert seen < adjacency.MAX_PAIRS


def test_a_grammar_of_too_many_steps_is_refused_with_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.engine.grammar.expressions.MAX_WORK", 1000)
    assert Grammar.gbnf(list_of_words(10)).accepts("w0")
    with pytest.raises(GrammarError, match="more than 1,000 steps"):
        Grammar.gbnf(list_of_words(1000))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Grammar.gbnf("root ::= [" + "".join(map(chr, range(0x10000, 0x20000, 2))) + "]"), "at most 10000"),
        (lambda: Grammar.regex("|".join(f"w{i}" for i in range(200_000))), "at most 1048576"),
        (lambda: Grammar.regex("[" + "ab" * 20_000 + "]"), "class of 40001 characters; at most 20000"),
        (lambda: Grammar.lark("start: /[" + "ab" * 20_000 + "]/"), "class of 40001 characters; at most 20000"),
        (lambda: Grammar.lark("start: " + " | ".join(f'"w{i}"' for i in range(30_000))), "at most 20000"),
        (lambda: Grammar.json_schema({"pattern": "[" + "ab" * 20_000 + "]"}), "class of 40001 characters"),
        (
            lambda: Grammar.json_schema({"properties": {f"p{i}": {} for i in range(5000)}}),
            "5000 properties; at most",
        ),
    ],
)
def test_too_costly_grammars_are_refused_with_value_limit_and_remedy(
    make: Callable[[], Grammar], problem: str
) -> None:
    with pytest.raises(GrammarError, match=problem):
        make()


# --- regular expressions, JSON schemas, Lark --------------------------------------------------


def test_a_regular_expression_matches_the_whole_text() -> None:
    grammar = Grammar.regex(r"[a-z]+/\d{2,3}(?i:END)?")
    assert grammar.accepts("abc/12")
    assert grammar.accepts("abc/123eNd")
    assert not grammar.accepts("abc/12 ")
    assert not grammar.accepts("abc/1")
    assert Grammar.regex(r"(?s:.*)x\n#").accepts("é\n x\n#")
    assert not Grammar.regex(".").accepts("\n")
    assert Grammar.regex("").accepts("")


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("ab(c", "column 3 of the pattern: unclosed group"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"a\b", "lookarounds"),
        ("[a&&b]", "the grammar allows no text"),
        ("a{2", "unclosed counted repetition"),
        ("\ud800", "no text contains"),
        ("(" * 100_000, "unclosed"),
    ],
)
def test_an_invalid_regular_expression_is_refused_in_one_line(pattern: str, problem: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(problem)) as caught:
        Grammar.regex(pattern)
    assert "\n" not in str(caught.value)


def test_an_exploding_regular_expression_is_stopped() -> None:
    grammar = Grammar.regex("(((a{0,1000}){0,1000}){0,1000}){0,1000}b")
    with pytest.raises(GrammarError, match="too") as caught:
        grammar.accepts("a" * 2000)
    assert "\n" not in str(caught.value)


def test_json_grammars_accept_what_their_schema_describes() -> None:
    grammar = Grammar.json_schema(PERSON)
    good = {"name": "é", "age": 7, "tags": ["red"], "zip": "12345", "inner": {"x": 0.5, "on": True}}
    assert grammar.accepts(json.dumps(good, ensure_ascii=False))
    assert grammar.accepts(json.dumps(good, indent=4, ensure_ascii=False))
    assert grammar.accepts(json.dumps(good, separators=(",", ":"), ensure_ascii=False))
    for wrong in ({"age": 151}, {"tags": ["blue"]}, {"name": ""}, {"more": 1}, {"zip": "1234"}, {"inner": 3}):
        assert not grammar.accepts(json.dumps({**good, **wrong}, ensure_ascii=False))
    assert Grammar.json_schema(json.dumps(PERSON)) == grammar
    assert Grammar.json_schema(True).accepts('[1, null, {"a": "b"}]')
    assert Grammar.json_object().accepts('{"a": [1.5e3, {}]}')
    assert not Grammar.json_object().accepts("[1]")
    assert Grammar.json_object().accepts(r'{"é": "\n\u0001"}')
    assert not Grammar.json_object().accepts(r'{"\u00e9": 1}')


def test_white_space_in_json_is_bounded() -> None:
    grammar = Grammar.json_object()
    assert grammar.accepts('{\n    "a": 1\r\n}')
    for white in ("  ", "\n\n", "\n" + " " * 41, "\t"):
        assert not grammar.accepts("{" + white + '"a":1}')
    assert not grammar.accepts(" {}")
    assert not grammar.accepts("{} ")
    matcher = GrammarCompiler(StubVocabulary()).matcher(grammar)
    assert matcher.accept_text(b"{ ")
    assert not matcher.allowed()[ord(" ")]


def test_a_schema_cannot_change_the_compilers_settings() -> None:
    strange = {"x-guidance": {"whitespace_pattern": "[ ]*", "lenient": True}, "type": "array"}
    assert not Grammar.json_schema(strange).accepts("[  ]")
    with pytest.raises(GrammarError, match="not"):
        Grammar.json_schema({**strange, "not": {}})


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$defs": {"a": {"not": {}}}, "$ref": "#/$defs/a"}, "not"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "http://example.com/x"}, "example.com"),
        ({"type": "nothing"}, "nothing"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"a": {1, 2}}, "not JSON"),
        ({"const": float("nan")}, "not JSON"),
        (False, "false"),
        ("[1]", "an object or a boolean"),
        ('{"const": NaN}', "NaN"),
        ({"$ref": "#"}, "requires itself"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "requires itself"),
        (
            {"type": "object", "properties": {"next": {"allOf": [{"$ref": "#"}]}}, "required": ["next"]},
            "requires itself",
        ),
        ('{"items":' * 100_000, "too deeply"),
        ('{"items":' * 200 + "{}" + "}" * 200, "too deeply"),
    ],
)
def test_an_unenforceable_schema_is_refused_by_keyword(schema: object, problem: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(problem)) as caught:
        Grammar.json_schema(schema)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# Terms of llguidance, of Rust and of our internals, which mean nothing to the author of a schema.
INTERNAL = re.compile(
    r"%json|coerce|lenient|x-guidance|json-schema:|f64|Some\(|None|panic|assert|usize|serde|[Ll]exer|Bias|"
    r"registry|retriev|[Uu]nsatisfiable|Pointer|hex escape|Unimplemented|RegexAst|stack level|"
    r"llguidance|start:|regex for"
)
ODD: list[object] = [None, True, False, -1, 0, 1.5, 3, 2**31, 2**60, 1e300, 5e-324, "", "a", "\ud800", "^a$", "("]
ODD += ["#", "#/a", "x:y", [], {}, [1], ["a"], [{}], [[]], {"a": 1}, {"a": {"$ref": "#"}}, {"type": "string"}]
odd_values = st.sampled_from(ODD)
keywords = st.sampled_from(
    [
        "type",
        "const",
        "enum",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "uniqueItems",
        "contains",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "minProperties",
        "maxProperties",
        "propertyNames",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
        "$ref",
        "$defs",
        "$schema",
        "x-guidance",
        "additionalItems",
        "dependentRequired",
    ]
)
types = st.sampled_from(["integer", "number", "string", "array", "object", "null", ["integer", "string"]])
odd_schemas = st.recursive(
    st.dictionaries(keywords, odd_values, max_size=3),
    lambda inner: st.one_of(
        st.builds(lambda type_, part: {**part, "type": type_}, types, inner),
        st.builds(lambda key, parts: {key: parts}, keywords, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda key, part: {key: part}, keywords, inner),
        st.builds(lambda part: {"properties": {"a": part}, "required": ["a"], "type": "object"}, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=int(os.environ.get("ERLLAMA_GRAMMARS", "10")) * 12, deadline=None)
@given(odd_schemas)
@example({"oneOf": [{"type": "integer"}, {"type": "number"}]})
@example({"type": "object", "required": ["b"], "additionalProperties": False})
@example({"type": "integer", "minimum": 3, "maximum": 2})
@example({"type": "string", "pattern": "^a$", "minLength": 3})
@example({"type": "integer", "multipleOf": 5e-324})
@example({"minimum": "a"})
@example({"$defs": {"a": {"$ref": "#/$defs/a", "minimum": 1}}, "$ref": "#/$defs/a", "minimum": 1})
def test_schema_errors_use_the_terms_of_json_schema(schema: dict[str, object]) -> None:
    problem = ""
    try:
        Grammar.json_schema(schema)
    except GrammarError as error:
        problem = str(error)
    # Words of the schema itself may be repeated.
    for text in re.findall(r"[A-Za-z:-]+", json.dumps(schema)):
        problem = problem.replace(text, "") if len(text) > 3 else problem
    assert INTERNAL.search(problem) is None, problem
    assert "\n" not in problem


def test_a_property_that_is_required_and_not_allowed_is_named() -> None:
    with pytest.raises(GrammarError, match="'b' is required, but neither listed nor allowed as additional"):
        Grammar.json_schema({"type": "object", "required": ["b"], "properties": {}, "additionalProperties": False})


def test_a_recursive_list_that_may_be_empty_ends() -> None:
    grammar = Grammar.json_schema({"type": "array", "items": {"$ref": "#"}})
    assert grammar.accepts("[[],[[]]]")
    inner = {"anyOf": [{"type": "null"}, {"$ref": "#"}]}
    tree = {"type": "object", "properties": {"next": inner}, "required": ["next"]}
    assert Grammar.json_schema(tree).accepts('{"next": {"next": null}}')


def test_invalid_json_is_refused_with_its_position() -> None:
    with pytest.raises(GrammarError, match="line 2, column 8") as caught:
        Grammar.json_schema('{\n "type"; 1}')
    assert (caught.value.line, caught.value.column) == (2, 8)


@pytest.mark.parametrize("link", ["ref", "items", "properties", "prefixItems"])
def test_thousands_of_references_do_not_end_the_process(link: str) -> None:
    n = 3000

    def one(i: int) -> dict[str, object]:
        further: dict[str, object] = {"$ref": f"#/$defs/a{i}"}
        return {
            "ref": further,
            "items": {"type": "array", "items": further},
            "properties": {"type": "object", "properties": {"x": further}},
            "prefixItems": {"type": "array", "prefixItems": [further]},
        }[link]

    chain = {f"a{i}": one(i + 1) for i in range(n)} | {f"a{n}": {"type": "string"}}
    accepted = made_or_refused(lambda: Grammar.json_schema({"$defs": chain, "$ref": "#/$defs/a0"}).accepts('"x"'))
    assert accepted in (link == "ref", None)


def test_lark_is_passed_to_llguidance() -> None:
    grammar = Grammar.lark('start: "<" name ">"\nname: /[a-z]+/\n')
    assert grammar.accepts("<abc>")
    assert not grammar.accepts("<>")
    with pytest.raises(GrammarError, match='line 2, column 4: unknown name: "nmae"') as caught:
        Grammar.lark("start: x\nx: nmae | y\ny: /a/")
    assert (caught.value.line, caught.value.column) == (2, 4)


@pytest.mark.parametrize(
    "text",
    ["", "start: start", 'start: "a" start', 'foo: "a"', "start: /[a&&b]/", "start: " + "(" * 10_000, "start: /(/"],
)
def test_invalid_lark_is_refused(text: str) -> None:
    with pytest.raises(GrammarError) as caught:
        Grammar.lark(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [4000, 100_000])
def test_lark_of_thousands_of_rules_does_not_end_the_process(n: int) -> None:
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(n)) + f'r{n}: "a"\n'
    assert made_or_refused(lambda: Grammar.lark(chain).accepts("a"), "rules") in (True, None)


# --- what a grammar is ------------------------------------------------------------------------


def test_grammars_are_values() -> None:
    one, other = Grammar.regex("a+"), Grammar.regex("a+")
    assert one == other
    assert hash(one) == hash(other)
    assert one != Grammar.regex("a*")
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301 - its own
    assert pickle.loads(pickle.dumps(one)).accepts("aa")  # noqa: S301 - its own
    with pytest.raises(AttributeError):
        one.source = "b"  # type: ignore[misc]
    assert Grammar.gbnf("a ::= [0]\nb ::= [1]", "a") != Grammar.gbnf("a ::= [0]\nb ::= [1]", "b")


def test_other_values_are_not_grammars() -> None:
    with pytest.raises(GrammarError, match="kinds"):
        Grammar("yaml", "a")
    with pytest.raises(GrammarError, match="kinds"):
        Grammar.regex(3)  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="mapping"):
        Grammar.json_schema(3)  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="characters"):
        Grammar.regex("a" * 5_000_000)
