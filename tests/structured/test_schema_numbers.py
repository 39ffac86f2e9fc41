"""Numbers in JSON schemas are exact for every size: in constants, in bounds, in arguments of tools."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from decimal import Decimal

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erllama import Grammar, GrammarError
from erllama.chat.tool_calls.call_grammar import write_call_grammar
from erllama.chat.tool_calls.formats import TOOL_FORMATS, get_tool_format
from erllama.chat.tool_calls.reader import read_calls
from erllama.chat.tool_calls.tools import normalize_tools
from erllama.engine.grammar.grammar import GrammarCompiler
from erllama.engine.grammar.schemas import keywords as schema_keywords
from support.chat.tool_calls import lark_literal
from support.grammar_walks import CLOSING, Vocabulary

# The number of examples in the suite and in a long run.
EXAMPLES = int(os.environ.get("ERLLAMA_GRAMMARS", "10"))
LARGE = 1234567890123456789
INT64 = (-(2**63), 2**63 - 1)
UINT64 = (0, 2**64 - 1)
# The integers at which doubles lose precision and at which machine integers end.
EDGES = [
    sign * (2**power + more) for power in (31, 32, 53, 54, 63, 64, 70) for more in (-1, 0, 1) for sign in (1, -1)
]
integers = st.one_of(st.sampled_from(EDGES), st.integers(-(2**70), 2**70), st.integers(-20, 20))


def accepts_number(schema: object, number: object) -> bool:
    return Grammar.json_schema(json.dumps(schema)).accepts(str(number))


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [INT64, UINT64, (0, 2**63 - 1), (-(2**53) - 1, 2**53 + 1)])
def test_the_bounds_of_code_generators_hold_at_both_ends(low: int, high: int) -> None:
    grammar = Grammar.json_schema({"type": "integer", "minimum": low, "maximum": high})
    for number in (low, low + 1, 0, 1, high - 1, high, high // 2 + 1):
        assert grammar.accepts(str(number)), number
    for wrong in (low - 1, high + 1, high * 10, low * 10 - 1):
        assert not grammar.accepts(str(wrong)), wrong


@pytest.mark.parametrize("bound", EDGES)
def test_one_bound_alone_is_exact(bound: int) -> None:
    for key, sign in (("minimum", 1), ("maximum", -1)):
        grammar = Grammar.json_schema({"type": "integer", key: bound})
        assert grammar.accepts(str(bound))
        assert grammar.accepts(str(bound + sign))
        assert grammar.accepts(str(sign * 10**40))
        assert not grammar.accepts(str(bound - sign))
        assert not grammar.accepts(str(-sign * 10**40))


@pytest.mark.parametrize("bound", EDGES)
@pytest.mark.parametrize("form", ["number", "boolean"])
def test_an_exclusive_bound_alone_is_exact(form: str, bound: int) -> None:
    for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        bounds = {exclusive: bound} if form == "number" else {inclusive: bound, exclusive: True}
        grammar = Grammar.json_schema({"type": "integer", **bounds})
        assert grammar.accepts(str(bound + sign))
        assert not grammar.accepts(str(bound))
        assert not grammar.accepts(str(bound - sign))


@st.composite
def ranges(draw: st.DrawFn) -> dict[str, object]:
    low, high = sorted((draw(integers), draw(integers)))
    found: dict[str, object] = {}
    for key, exclusive, bound in (("minimum", "exclusiveMinimum", low), ("maximum", "exclusiveMaximum", high)):
        kind = draw(st.sampled_from(["none", "inclusive", "inclusive", "exclusive", "both"]))
        if kind in ("inclusive", "both"):
            found[key] = bound
        if kind in ("exclusive", "both"):
            found[exclusive] = bound + draw(st.integers(-1, 1))
    return found


def within(number: Decimal | int, bounds: dict[str, object]) -> bool:
    compared = {
        "minimum": lambda bound: number >= bound,
        "exclusiveMinimum": lambda bound: number > bound,
        "maximum": lambda bound: number <= bound,
        "exclusiveMaximum": lambda bound: number < bound,
    }
    return all(compared[key](bound) for key, bound in bounds.items())


def grammar_or_none(schema: object) -> Grammar | None:
    """None where no JSON matches the schema."""
    refused = ""
    try:
        return Grammar.json_schema(json.dumps(schema))
    except GrammarError as error:
        refused = str(error)
    assert "no JSON matches the schema" in refused or "Unsatisfiable" in refused, refused
    return None


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(ranges(), st.lists(integers, max_size=4))
def test_an_integer_is_accepted_within_its_bounds(bounds: dict[str, object], others: list[int]) -> None:
    grammar = grammar_or_none({"type": "integer", **bounds})
    ends = [bound + more for bound in bounds.values() if isinstance(bound, int) for more in (-1, 0, 1)]
    for number in (*ends, *others):
        accepted = grammar is not None and grammar.accepts(str(number))
        assert accepted == within(number, bounds), (bounds, number)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(ranges(), st.lists(st.tuples(integers, st.sampled_from(["", ".0", ".5", ".001", ".25"])), max_size=4))
def test_a_number_is_accepted_within_its_bounds(bounds: dict[str, object], others: list[tuple[int, str]]) -> None:
    assume(any(isinstance(bound, int) and abs(bound) > 2**53 for bound in bounds.values()))
    grammar = grammar_or_none({"type": "number", **bounds})
    ends = [
        (bound + more, end)
        for bound in bounds.values()
        if isinstance(bound, int)
        for more in (-1, 0, 1)
        for end in ("", ".0", ".000000001")
    ]
    for whole, fraction in (*ends, *others):
        text = f"{whole}{fraction}"
        accepted = grammar is not None and grammar.accepts(text)
        assert accepted == within(Decimal(text), bounds), (bounds, text)


def test_bounds_beyond_doubles_are_exact() -> None:
    schema = {"type": "number", "minimum": -1e20, "maximum": 9007199254740993.5}
    grammar = Grammar.json_schema(schema)
    # The second is not a double: Python reads it as the even one next to it.
    for number in ("-100000000000000000000", "-99999999999999999999.5", "0.25", "9007199254740993", "1"):
        assert grammar.accepts(number), number
    for wrong in ("-100000000000000000001", "-100000000000000000000.1", "9007199254740995", "1e20"):
        assert not grammar.accepts(wrong), wrong
    assert accepts_number({"type": "integer", "maximum": 1e19}, 10**19)
    assert not accepts_number({"type": "integer", "maximum": 1e19}, 10**19 + 1)


@pytest.mark.parametrize("step", [1, 2, 5, 8, 10, 1000, 0.5])
def test_multiple_of_works_within_large_bounds(step: float) -> None:
    grammar = Grammar.json_schema({"type": "integer", "minimum": INT64[0], "maximum": INT64[1], "multipleOf": step})
    for number in (*INT64, *range(-40, 41), 8000, -3000, LARGE, LARGE + 1, LARGE + 3, -LARGE - 1):
        assert grammar.accepts(str(number)) == (number % step == 0), number


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "integer", "minimum": LARGE, "multipleOf": 3}, "multipleOf 3"),
        ({"type": "number", "minimum": LARGE, "multipleOf": 0.5}, "multipleOf"),
        ({"type": "integer", "minimum": 10**500}, "501 digits"),
        ({"type": "integer", "minimum": LARGE, "maximum": LARGE - 1}, "no JSON matches the schema"),
        ({"type": "object", "patternProperties": {"^x": {"const": LARGE}}}, "patternProperties"),
        ({"properties": {"a": {"const": LARGE}, "b": {}}, "type": "object", "maxProperties": 1}, "maxProperties"),
        ({"oneOf": [{"const": LARGE}, {"type": "integer"}]}, "oneOf"),
        ({"not": {"const": LARGE}}, "not"),
        ({"type": "array", "items": {"const": LARGE}, "minItems": 10**9}, "minItems is 1000000000; at most 100000"),
        ({"type": "string", "minLength": 2**63 - 1}, f"minLength is {2**63 - 1}; at most {2**31 - 1} .*: use"),
        ({"allOf": [{"minimum": LARGE}, {"$ref": "#/nowhere"}]}, "#/nowhere"),
    ],
)
def test_keywords_that_exclude_large_numbers_are_named(schema: object, problem: str) -> None:
    with pytest.raises(GrammarError, match=problem):
        Grammar.json_schema(json.dumps(schema))


def kind(name: str, **more: object) -> dict[str, object]:
    """An object of one kind, with a large number beside it."""
    properties = {"kind": {"const": name}, "n": {"type": "integer", "maximum": LARGE}}
    return {"properties": properties, "required": ["kind"], **more}


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ([{"const": LARGE}, {"type": "string"}, {"const": 7.5}], [str(LARGE), '"a"', "7.5"], ["7", "true"]),
        ([{"const": LARGE, "type": "string"}, {"const": LARGE}], [str(LARGE)], [f'"{LARGE}"']),
        ([{"type": "integer", "maximum": -LARGE}, {"type": "integer", "minimum": LARGE}], [str(LARGE)], ["0"]),
        (
            [kind("a", type="object"), kind("b", type=["object", "null"]), {"type": "string"}],
            ['{"kind":"a"}', '{"kind":"b","n":1}', "null", '"x"'],
            ['{"kind":"c"}', "1"],
        ),
        ([{"enum": [LARGE, "a"]}, {"enum": [LARGE + 1, "b"]}, {"enum": [None]}], ['"b"', "null"], ['"c"']),
    ],
)
def test_disjoint_options_of_one_of_are_accepted(options: list[object], good: list[str], bad: list[str]) -> None:
    grammar = Grammar.json_schema({"oneOf": options})
    assert all(map(grammar.accepts, good))
    assert not any(map(grammar.accepts, bad))


@pytest.mark.parametrize(
    "options",
    [
        [{"const": LARGE}, {"const": LARGE}],
        [{"const": LARGE}, {"enum": ["a", 1e18, LARGE]}],
        [{"enum": [10**18, "a"]}, {"const": 1e18}],
        [{"type": "integer", "minimum": LARGE}, {"type": "integer", "minimum": 0, "maximum": LARGE}],
        # A text satisfies both, because only objects have properties.
        [kind("a"), kind("b")],
        [kind("a", type="object"), kind("a", type="object")],
    ],
)
def test_overlapping_options_of_one_of_are_refused(options: list[object]) -> None:
    with pytest.raises(GrammarError, match="may match together is not supported; use anyOf"):
        Grammar.json_schema({"oneOf": options})


@pytest.mark.parametrize("option", [lambda n: {"const": LARGE + n}, lambda n: kind(f"k{n}", type="object")])
def test_every_option_of_one_of_is_read_once(
    option: Callable[[int], dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_read = 0

    def counted(parts: Iterable[dict[str, object]]) -> frozenset[str]:
        nonlocal n_read
        n_read += 1
        return types_of(parts)

    types_of = schema_keywords.types_of
    for module in ("rules", "one_of"):
        monkeypatch.setattr(f"erllama.engine.grammar.schemas.{module}.types_of", counted, raising=False)
    Grammar.json_schema({"oneOf": [option(n) for n in range(100)]})
    assert n_read < 1000


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([{"const": LARGE + n} for n in range(5000)], "oneOf has 5000 options, .* at most 4000 .*: use fewer"),
        (
            [{"type": "integer", "minimum": LARGE + n, "maximum": LARGE + n} for n in range(1000)],
            "oneOf has 1000 options, of which more than 50000 pairs .*; use fewer options, anyOf",
        ),
    ],
)
def test_too_many_options_are_refused_with_their_count(options: list[object], problem: str) -> None:
    with pytest.raises(GrammarError, match=problem):
        Grammar.json_schema({"oneOf": options})


@pytest.mark.parametrize("most", [10**5 + 1, 2**31 - 1, 2**31, 2**63 - 1, 1e9, 1e20])
@pytest.mark.parametrize("item", [{"type": "integer", "minimum": LARGE}, {"type": "string", "maxLength": 3}])
def test_unreachable_maximum_counts_are_no_limit(item: object, most: float) -> None:
    items = Grammar.json_schema({"type": "array", "items": item, "maxItems": most})
    others = Grammar.json_schema({"type": "object", "additionalProperties": item, "maxProperties": most})
    for value in (str(LARGE), '"abc"'):
        accepted = (value == str(LARGE)) == (item != {"type": "string", "maxLength": 3})
        assert items.accepts(f"[{value},{value}]") == accepted
        assert others.accepts(f'{{"a":{value},"b":{value}}}') == accepted
    texts = Grammar.json_schema({"type": "string", "pattern": "^a+$", "maxLength": most})
    assert texts.accepts('"aaaa"')
    assert not texts.accepts('"b"')


def test_counts_are_integers_in_every_notation() -> None:
    schema = (
        '{"items":{"type":"string","minLength":1.0,"maxLength":2.0},"type":"array","minItems":1.0,"maxItems":2e0}'
    )
    grammar = Grammar.json_schema(schema)
    assert all(map(grammar.accepts, ('["a"]', '["ab","c"]')))
    assert not any(map(grammar.accepts, ("[]", '[""]', '["abc"]', '["a","b","c"]')))
    grammar = Grammar.json_schema('{"type":"object","minProperties":1.0,"maxProperties":1.0}')
    assert grammar.accepts('{"a":1}')
    assert not grammar.accepts("{}")
    # A property and a constant may look like a count.
    grammar = Grammar.json_schema({"properties": {"maxItems": {"const": {"maxItems": 1.5}}}, "type": "object"})
    assert grammar.accepts('{"maxItems":{"maxItems":1.5}}')


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ('{"const":1e300}', "1" + "0" * 300, "1" + "0" * 299 + "1"),
        ('{"const":-1e300}', "-1" + "0" * 300, "1" + "0" * 300),
        ('{"const":1234567890123456789.0}', "1234567890123456789", "1234567890123456768"),
        ('{"enum":[[12345678901234567890e-1]]}', "[1234567890123456789]", "[1234567890123456768]"),
        ('{"type":"integer","minimum":9007199254740993.0}', "9007199254740993", "9007199254740992"),
        ('{"type":"number","exclusiveMaximum":9007199254740993e0}', "9007199254740992.5", "9007199254740993"),
        ('{"type":"number","minimum":1e300,"maximum":1e300}', "1" + "0" * 300 + ".0", "9" * 300),
        # No double beyond 2**53 has a fraction: this one is read as the even one next to it.
        ('{"type":"number","minimum":9007199254740993.5,"maximum":9007199254740993.5}', f"{2**53 + 2}.0", "1.0"),
    ],
)
def test_numbers_in_schema_texts_are_exact_in_every_notation(schema: str, good: str, bad: str) -> None:
    grammar = Grammar.json_schema(schema)
    assert grammar.accepts(good)
    assert not grammar.accepts(bad)


def test_a_number_beyond_doubles_is_refused_with_its_text() -> None:
    with pytest.raises(GrammarError, match=r"1e400; the largest"):
        Grammar.json_schema('{"const": 1e400}')


# --- constants --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [LARGE, -LARGE, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**400 + 1])
def test_a_constant_accepts_exactly_its_value(number: int) -> None:
    for schema in ({"const": number}, {"enum": ["x", number, None]}, {"type": "integer", "enum": [7, number]}):
        grammar = Grammar.json_schema(schema)
        assert grammar.accepts(str(number))
        for wrong in (number - 1, number + 1, -number, number * 10):
            assert not grammar.accepts(str(wrong))
    assert Grammar.json_schema({"enum": ["x", number, None]}).accepts("null")


def test_constants_may_contain_large_numbers() -> None:
    grammar = Grammar.json_schema({"enum": [{"id": LARGE, "of": [LARGE + 1, "a"]}, [LARGE], 5, True]})
    for accepted in (json.dumps({"id": LARGE, "of": [LARGE + 1, "a"]}), f"[{LARGE}]", "5", "true"):
        assert grammar.accepts(accepted)
    for refused in (json.dumps({"id": LARGE, "of": [LARGE, "a"]}), f"[{LARGE + 1}]", "[]", "6", "false", "{}"):
        assert not grammar.accepts(refused)


# --- everywhere in a schema -------------------------------------------------------------------

ACCOUNT = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": INT64[0], "maximum": INT64[1], "description": "It."},
        'a "name"\n': {"type": "string", "maxLength": 3},
        "flags": {"type": "array", "items": {"$ref": "#/$defs/flags"}, "minItems": 1, "maxItems": 2},
        "parent": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        "pair": {"type": "array", "prefixItems": [{"const": LARGE}, {"type": "string"}], "items": {"type": "null"}},
        "point": {"$ref": "#/$defs/point"},
    },
    "required": ["id"],
    "additionalProperties": {"allOf": [{"$ref": "#/$defs/flags"}, {"minimum": 2**60}]},
    "$defs": {
        "flags": {"type": "integer", "minimum": 0, "maximum": UINT64[1]},
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/point"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


def test_numbers_are_exact_in_every_part_of_a_schema() -> None:
    grammar = Grammar.json_schema(ACCOUNT)
    good: list[dict[str, object]] = [
        {"id": INT64[0]},
        {"id": INT64[1], 'a "name"\n': "abc", "flags": [UINT64[1], 0]},
        {"id": 1, "parent": {"id": INT64[1], "parent": None}},
        {"id": 1, "pair": [LARGE, "x", None, None]},
        {"id": 1, "point": {"x": 1.5, "next": {"x": -2}}, "other": 2**60, "é": UINT64[1]},
    ]
    bad: list[dict[str, object]] = [
        {},
        {"id": INT64[1] + 1},
        {"id": "1"},
        {"id": 1, 'a "name"\n': "abcd"},
        {"id": 1, "flags": []},
        {"id": 1, "flags": [-1]},
        {"id": 1, "flags": [UINT64[1] + 1]},
        {"id": 1, "flags": [1, 2, 3]},
        {"id": 1, "parent": {"id": INT64[0] - 1}},
        {"id": 1, "pair": [LARGE - 1]},
        {"id": 1, "pair": [LARGE, "x", 1]},
        {"id": 1, "point": {"x": 1.5, "next": {}}},
        {"id": 1, "other": 2**60 - 1},
        {"id": 1, "other": UINT64[1] + 1},
    ]
    for separators in ((",", ":"), (", ", ": ")):
        for value in good:
            assert grammar.accepts(json.dumps(value, ensure_ascii=False, separators=separators)), value
        for value in bad:
            assert not grammar.accepts(json.dumps(value, ensure_ascii=False, separators=separators)), value
    assert grammar.accepts(json.dumps(good[2], indent=4))
    for white in ("{  ", "{\n\n"):
        assert not grammar.accepts(white + '"id":1}')


small = st.sampled_from(
    [
        {"type": "string", "maxLength": 2},
        {"type": "boolean"},
        {"enum": ["a", 1, None]},
        True,
        {"type": "integer", "maximum": 9},
        {"$ref": "#/$defs/large"},
        {"$ref": "#/$defs/either"},
    ]
)
numeric = st.builds(
    lambda type_, bounds: {"type": type_, **bounds}, st.sampled_from(["integer", ["integer", "null"]]), ranges()
)
schemas = st.recursive(
    st.one_of(numeric, numeric, small, integers.map(lambda number: {"const": number})),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"allOf": options}),
        st.builds(
            lambda first, rest, least: {"type": "array", "prefixItems": first, "items": rest, "minItems": least},
            st.lists(inner, max_size=2),
            inner | st.just(False),
            st.integers(0, 2),
        ),
        st.builds(
            lambda properties, required, rest: {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": rest,
            },
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.sets(st.sampled_from("abd"), max_size=2).map(sorted),
            inner | st.booleans(),
        ),
    ),
    max_leaves=5,
)
DEFINITIONS = {
    "large": {"type": "integer", "minimum": 2**62, "maximum": 2**65},
    "either": {
        "anyOf": [{"type": "boolean"}, {"type": "array", "items": {"$ref": "#/$defs/either"}, "maxItems": 1}]
    },
}
instances = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, st.sampled_from(["", "a", "abc"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abcdx"), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=3 * EXAMPLES, deadline=None)
@given(schemas, st.lists(instances, min_size=1, max_size=8), integers)
def test_schemas_with_large_numbers_accept_what_a_validator_accepts(
    schema: object, values: list[object], number: int
) -> None:
    assume(isinstance(schema, dict))
    assert isinstance(schema, dict)
    whole = {**schema, "allOf": [*schema.get("allOf", []), {"$ref": "#/$defs/wide"}]}
    whole["$defs"] = {**DEFINITIONS, "wide": {"not a keyword": True, "maximum": 2**69}}
    grammar = grammar_or_none(whole)
    validator = jsonschema.Draft202012Validator(whole)
    for value in (*values, number, [number], {"a": number}, {"a": number, "b": number}):
        if isinstance(value, dict):
            # A grammar has the properties in the order of the schema.
            value = {name: value[name] for name in _ordered(schema, value)}
        accepted = grammar is not None and grammar.accepts(json.dumps(value))
        if accepted:
            assert validator.is_valid(value), (whole, value)
        elif not _has_objects(value):
            assert not validator.is_valid(value), (whole, value)


def _ordered(schema: dict[str, object], value: dict[str, object]) -> list[str]:
    properties = schema.get("properties", {})
    assert isinstance(properties, dict)
    required = schema.get("required", [])
    assert isinstance(required, list)
    first = [name for name in dict.fromkeys([*properties, *required]) if name in value]
    return [*first, *(name for name in value if name not in first)]


def _has_objects(value: object) -> bool:
    """Return whether the order of properties could explain why a value was not accepted."""
    if isinstance(value, list):
        return any(map(_has_objects, value))
    return isinstance(value, dict) and (len(value) > 1 or any(map(_has_objects, value.values())))


# --- definitions that refer to themselves ------------------------------------------------------

LIST = {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 2}
TREE = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}}]}
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer", "maximum": 9}, "next": {"$ref": "#/$defs/node"}},
    "required": ["value"],
    "additionalProperties": False,
}
RECURSIVE = {"list": LIST, "tree": TREE, "node": NODE}


@pytest.mark.parametrize("number", [9, 2**70], ids=["small", "large"])
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"allOf": [{"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/tree"}]}, [1, [[2], 3], []], ["x", [["x"]]]),
        ({"allOf": [{"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/list"}]}, [[], [[], [[]]]], [1, [1], [[], [], []]]),
        ({"$ref": "#/$defs/tree", "items": {"$ref": "#/$defs/list"}}, [1, [[], [[]]]], [[1], [[[1]]]]),
        (
            {"allOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/node"}]},
            [{"value": 1}, {"value": 2, "next": {"value": 9, "next": {"value": -1}}}],
            [{}, {"value": 10}, {"value": 1, "next": {}}, {"value": 1, "next": {"value": 10}}],
        ),
    ],
)
def test_a_value_may_have_to_match_two_recursive_definitions(
    schema: dict[str, object], good: list[object], bad: list[object], number: int
) -> None:
    whole = {"anyOf": [schema, {"const": {"n": number}}], "$defs": RECURSIVE}
    grammar = Grammar.json_schema(whole)
    validator = jsonschema.Draft202012Validator(whole)
    for value in (*good, {"n": number}):
        assert validator.is_valid(value)
        assert grammar.accepts(json.dumps(value)), value
    for value in bad:
        assert not validator.is_valid(value)
        assert not grammar.accepts(json.dumps(value)), value


# --- arguments of tools -----------------------------------------------------------------------

TOOLS = normalize_tools(
    [
        {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "exact": {"const": LARGE},
                    "one": {"enum": [2**64 - 1, LARGE + 2]},
                    "least": {"type": "integer", "minimum": 2**53 + 1, "maximum": INT64[1]},
                },
                "required": ["exact", "one", "least"],
                "additionalProperties": False,
            },
        }
    ]
)


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_tool_arguments_lose_no_digit(format: str) -> None:
    words = Vocabulary([])
    grammar = Grammar.lark(
        write_call_grammar(get_tool_format(format), TOOLS, name=None, parallel=False, literal=lark_literal)
    )
    compiler = GrammarCompiler(words)
    for seed in range(5):
        chance, matcher, text = random.Random(seed), compiler.matcher(grammar), ""
        while True:
            allowed = np.flatnonzero(matcher.allowed()).tolist()
            assert allowed, text
            if words.end in allowed:
                break
            token = chance.choice([token for token in allowed if words.names[token] in CLOSING] or allowed)
            matcher.accept(token)
            text += words.names[token]
        (call,) = read_calls(get_tool_format(format), text, TOOLS)
        jsonschema.validate(call.arguments, TOOLS[0]["function"]["parameters"])  # type: ignore[index]
        assert call.arguments["exact"] == LARGE
        assert call.arguments["one"] in (2**64 - 1, LARGE + 2)
        assert str(call.arguments["exact"]) in text


@pytest.mark.parametrize("maximum", [1, 2])
def test_short_arrays_and_objects_of_large_numbers_have_a_grammar(maximum: int) -> None:
    number = {"type": "integer", "minimum": 2**62}
    array = Grammar.json_schema({"type": "array", "items": number, "maxItems": maximum})
    mapping = Grammar.json_schema({"type": "object", "additionalProperties": number, "maxProperties": maximum})
    for n in range(4):
        values = [2**62 + i for i in range(n)]
        assert array.accepts(json.dumps(values)) is (n <= maximum)
        assert mapping.accepts(json.dumps({str(value): value for value in values})) is (n <= maximum)
