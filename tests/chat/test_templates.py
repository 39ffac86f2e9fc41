"""Chat templates: rendered byte for byte as by transformers; hostile templates are refused."""

from __future__ import annotations

import copy
import enum
import json
import logging
import tempfile
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.chat.templates import budget
from erllama.chat.templates.compiler import MAX_NESTING, MAX_NODES, MAX_SOURCE
from erllama.chat.templates.limits import MAX_CALLS, MAX_TEXT
from erllama.chat.templates.plain_data import MAX_INPUT_DEPTH
from erllama.chat.templates.template import CHATML, MAX_MESSAGE, ChatTemplate, render_chat_template
from erllama.errors import ChatError, OptionError, TemplateError
from support.chat.templates import ALL, BOMBS, BRACKETS, ESCAPES, LARGE, SHORT, SOURCES, TAGGED, grown
from support.examples import examples
from support.paths import SHARED
from support.subprocesses import must_run

Conversation = list[dict[str, Any]]

OURS = {**ALL, "chatml": CHATML}
REAL = sorted((SHARED / "templates").glob("*.jinja"))
TEMPLATES = [
    *(pytest.param(source, id=name) for name, source in OURS.items()),
    *(pytest.param(path.read_text(), id=path.stem) for path in REAL),
]
HELLO: Conversation = [{"role": "user", "content": "hello"}]
# The machine may be busy. A bounded rendering takes a fraction of this; an unbounded one would take hours.
PATIENCE = 60.0

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where, <b>&'quoted'"},
        "unit": {"type": "string", "enum": ["C", "F"], "nullable": True},
        "days": {"type": "array", "items": {"type": "integer"}},
        "place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
    },
    "required": ["city"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "“Météo”", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}}


def call(identifier: str, arguments: object, content: str | None = "") -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": identifier, "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


CONVERSATIONS: dict[str, Conversation] = {
    "one turn": HELLO,
    "no message": [],
    "system prompt": [{"role": "system", "content": " be brief \n"}, *HELLO],
    "several turns": [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": " and?\n"}],
    "unicode": [{"role": "user", "content": "é 漢字 🎉 \u202e \x00 \ud800 <|im_end|> {{ 7 * 7 }} & < > ' \""}],
    "empty texts": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, *HELLO],
    "content of None": [*HELLO, {"role": "assistant", "content": None}],
    "no content": [{"role": "user"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "call and result": [
        *HELLO,
        call("abcdefghi", {"city": "Paris", "days": [1, 2.5, None, True], "名": "é"}),
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"celsius": 3}'},
        {"role": "user", "content": "thanks"},
    ],
    "call as text": [
        *HELLO,
        call("1", '{"city": "Paris"}', None),
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
    ],
    "two calls": [
        *HELLO,
        {**call("abcdefghi", {}), "tool_calls": call("abcdefghi", {})["tool_calls"] * 2},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
    ],
    "thinking": [*HELLO, {"role": "assistant", "content": "hi", "reasoning_content": "hm\n"}, *HELLO],
    "thinking, in the last message": [*HELLO, {"role": "assistant", "content": "hi", "thinking": "hm"}],
    "thinking, other name": [*HELLO, {"role": "assistant", "content": "hi", "reasoning": "hm", "thinking": None}],
    "thinking in the text": [*HELLO, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhi"}, *HELLO],
    "two of users": [*HELLO, *HELLO],
    "other roles": [{"role": "developer", "content": "d"}, *HELLO, {"role": "critic", "content": "no"}],
    "result first": [{"role": "tool", "content": "3", "tool_call_id": "1"}],
}


@pytest.fixture(scope="session")
def reference() -> Callable[..., str]:
    """Render a conversation with transformers."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(source: str, messages: Conversation, **args: object) -> str:
        rendered, _ = render_jinja_template(
            [messages], chat_template=source, bos_token="<s>", eos_token="</s>", **args
        )
        return str(rendered[0])

    return render


def outcome(render: Callable[[], str], error: type[Exception]) -> tuple[str, str]:
    try:
        return "rendered", render()
    except error as raised:
        return "raised", str(raised)


def assert_as_reference(
    reference: Callable[..., str], source: str, template: ChatTemplate, messages: Conversation, **args: object
) -> None:
    args.setdefault("add_generation_prompt", True)
    theirs = outcome(lambda: reference(source, messages, **args), Exception)
    ours = outcome(lambda: template.render(messages, **args), TemplateError)
    assert ours == theirs


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


# --- as transformers renders ----------------------------------------------------------------------


@pytest.mark.parametrize("source", TEMPLATES)
def test_conversations_render_as_in_transformers(reference: Callable[..., str], source: str) -> None:
    template = template_of(source)
    for messages in CONVERSATIONS.values():
        for tools in (None, [WEATHER], [WEATHER, TIME]):
            for extra in ({}, {"enable_thinking": False}, {"thinking": True, "add_generation_prompt": False}):
                assert_as_reference(reference, source, template, messages, tools=tools, **extra)


@pytest.mark.parametrize("source", TEMPLATES)
def test_continued_messages_render_as_in_transformers(reference: Callable[..., str], source: str) -> None:
    template = template_of(source)
    for messages in CONVERSATIONS.values():
        for field in (True, "reasoning_content"):
            args: dict[str, Any] = {"continue_final_message": field, "add_generation_prompt": False}
            theirs, expected = outcome(lambda m=messages, a=args: reference(source, m, **a), Exception)
            ours, text = outcome(lambda m=messages, a=args: template.render(m, **a), ChatError)
            assert ours == theirs
            if ours == "rendered":
                assert text == expected


def test_documents_and_variables_render_as_in_transformers(reference: Callable[..., str]) -> None:
    documents = [{"title": "one two", "text": "a\nb"}, {"title": "", "text": "漢"}]
    for source in (*OURS.values(), *(path.read_text() for path in REAL)):
        template = template_of(source)
        assert_as_reference(reference, source, template, HELLO, documents=documents)
        variables = {
            "date_string": "1 Jan",
            "reasoning_effort": "high",
            "custom_tools": [WEATHER],
            "system_prompt": "",
        }
        assert_as_reference(reference, source, template, HELLO, **variables)


texts = st.text(max_size=12) | st.sampled_from(
    ["", " ", "<think>a</think>b", "</think>", "a\nb\n", "'\"&<", "{{x}}"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
contents = texts | st.none() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=2)
calls = st.builds(
    lambda name, arguments, identifier: {
        "id": identifier,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    st.sampled_from(["weather", "time"]),
    st.dictionaries(texts, values, max_size=3) | st.just("{}"),
    st.sampled_from(["abcdefghi", "1"]),
)
messages_of_any_kind = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]), "content": contents},
        optional={
            "tool_calls": st.lists(calls, max_size=2),
            "reasoning_content": texts,
            "thinking": texts,
            "tool_call_id": st.sampled_from(["abcdefghi", "1"]),
            "name": st.just("weather"),
        },
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=examples(25))
@given(data=st.data())
def test_arbitrary_conversations_render_as_in_transformers(
    reference: Callable[..., str], data: st.DataObject
) -> None:
    messages = data.draw(messages_of_any_kind)
    tools = data.draw(st.sampled_from([None, [], [WEATHER], [TIME, WEATHER]]))
    thinking = data.draw(st.sampled_from([{}, {"enable_thinking": True}, {"enable_thinking": False}]))
    for parameter in TEMPLATES:
        source = parameter.values[0]
        assert isinstance(source, str)
        assert_as_reference(reference, source, compiled(source), messages, tools=tools, **thinking)


def compiled(source: str, cache: dict[str, ChatTemplate] = {}) -> ChatTemplate:  # noqa: B006 - is the cache
    if source not in cache:
        cache[source] = template_of(source)
    return cache[source]


EXPRESSIONS = """\
[1, 2, 3] | map("string") | join("-")
{"b": [1], "a": {"c": none}} | tojson
{"b": 1, "a": 2} | tojson(indent=3, separators=(", ", " : "), sort_keys=true, ensure_ascii=true)
"é\\u2028<&'" | tojson
"é" | tojson(true)
[true, 1.0, 1e400, -3] | tojson
"  Hello World  " | trim | lower | title
"xxhixx" | trim("x")
"a\\nb" | indent
"a\\n\\nb" | indent("..", first=true, blank=true)
"aXbX" | replace("X", "<>", 1)
"abc" | first ~ "abc" | last ~ [] | first
[3, 1, 2] | sort | list ~ ["b", "A", "c"] | sort(case_sensitive=true)
[{"a": 2, "b": {"c": 1}}, {"a": 1, "b": {"c": 3}}] | sort(attribute="a,b.c") | map(attribute="b.c") | list
[{"a": "x"}, {}] | map(attribute="a", default="none") | join("|")
[{"a": "x"}, {}] | selectattr("a") | list | length
[{"a": 1}, {"a": 2}] | rejectattr("a", "gt", 1) | map(attribute="a") | list
[1, 2, 3, 4] | select("odd") | list ~ [1, 2, 3, 4] | reject("divisibleby", 2) | list
["a", "A", "b"] | unique | list
[1, 2] | map("foo") | list
[] | map("foo") | list
[1] | map | list
[1] | select("foo") | list
{"a": 1, "B": 2} | dictsort | join
{"a": 1, "b": 0} | dictsort(by="value", reverse=true)
{"a": 1}.items() | list ~ ({"a": 1} | items | list)
missing | items | list
missing | default("d") ~ ("" | default("d")) ~ ("" | default("d", true)) ~ (none | d("x", boolean=true))
"3.7" | int ~ "x" | int(5) ~ "0x1f" | int(0, 16) ~ "2.5" | float ~ 3.7 | int
2.567 | round(1) ~ 2.1 | round(method="ceil") ~ 5 | round
[1, 2.5] | sum ~ [{"n": 3}] | sum("n", 1) ~ [[1], [2]] | sum(start=[])
[2, 3] | max ~ ["b", "A"] | min ~ [] | max
[1, 2] | reverse | list ~ "ab" | reverse
"%s and %r is %5.1f%%" % ("a", "b", 2.25)
"%(x)s" % {"x": [1]}
"%s" | format("x") ~ "%d" % 3
"{}" ~ ("<b>" | safe) ~ ("<b>" | safe + "<i>") ~ ("%s" | safe)
["<b>", "<i>" | safe] | join(" ")
"a,b,c".split(",", 1) ~ " a  b ".split() ~ "a\\nb".splitlines() ~ "a-b-c".rsplit("-", 1)
"abc".startswith("a") ~ "abc".endswith(("c", "d")) ~ "abc".find("b") ~ "abcabc".count("bc")
"abc".upper() ~ "a b".title() ~ "ABC".lower() ~ "ab".capitalize() ~ "aB".swapcase()
"x".join(["a", "b"]) ~ "a.b".partition(".") ~ "prefix".removeprefix("pre") ~ "12".isdigit()
"".join([1])
"abc".index("z")
[1, 2, 1].count(1) ~ [1, 2].index(2)
{"a": 1}.get("a") ~ {"a": 1}.get("b", 2) ~ {"a": 1}.keys() | list ~ {"a": 1}.values() | list
{"items": 1}.items is defined ~ {"items": 1}["items"] ~ {"x": 1}.x ~ {"x": 1}["x"]
messages.append(1)
messages.foo ~ messages[0].foo ~ messages[7] ~ messages[-1].role ~ messages["x"]
messages[0].update({"a": 1})
messages[0].foo.bar
messages[0].foo()
messages[0]()
none.x ~ none["x"]
none + "x"
"x" + 1
1 + "x"
[1] + (1, 2)
1 / 0
2 ** -1 ~ 7 // 2 ~ -7 % 3 ~ 10 / 4 ~ +3 ~ -(3)
1 < 2 < 3 ~ (1 == 1.0) ~ ("a" in "abc") ~ (1 in [1]) ~ ("a" not in {"a": 1}) ~ ([1] == [1]) ~ ((1, 2) < (1, 3))
1 < "a"
1 in 2
[] is iterable ~ "" is string ~ {} is mapping ~ 1 is number ~ true is boolean
none is none ~ 2 is even ~ () is sequence
1 is sameas 1 ~ 1 is in [1] ~ "a" is lower ~ 1.5 is float ~ 2 is integer ~ true is true
3 is divisibleby 3 ~ 2 is ge 2
missing is defined ~ missing is undefined ~ messages is callable ~ range is callable ~ missing ~ missing.x
"abc"[1:] ~ "abc"[::-1] ~ [1, 2, 3][-2:] ~ (1, 2)[0] ~ "abc"[5:] ~ "abc"[9]
range(3) | list ~ range(5, 1, -2) | list ~ range(3) ~ range(4)[1:]
range(10 ** 6)
dict(a=1, b=2) ~ dict({"a": 1}, b=3) ~ dict([("x", 1)])
namespace(a=1).a ~ namespace(a=1).b
namespace(_a=1)
raise_exception("no " ~ messages | length)
raise_exception()
raise_exception([1])
"a" if false ~ ("b" if missing else "c")
("a" if false) + "x"
[1, [2, {"a": "é'"}], (3,), none, true] ~ (1,) ~ [] ~ {}
1e3 ~ 1_000 ~ 0x1F ~ 0.1 ~ 1e16 ~ 123456789012345678901234567890
true ~ none ~ false ~ True ~ None
"a" "b" ~ 'it\\'s' ~ "tab\\t|" ~ "\\u00e9"
messages | length ~ "abc" | count ~ {} | length
messages | string | length
5 | length
5 | upper ~ none | upper ~ [1] | lower ~ "ß" | upper
5 | list
missing | list ~ missing | length ~ missing | join ~ missing | first ~ missing | upper
(messages | map(attribute="role")) is sequence
(messages | map(attribute="role")) | length
(messages | select) | first | tojson
{"a": missing} | tojson
{missing: 1}
{[1]: 1}
(1, 2) in {(1, 2): 3}
{"a": 1}[[1]]
tools ~ documents ~ add_generation_prompt
bos_token ~ eos_token ~ pad_token
loop
caller
2 | abs ~ -2 | abs ~ "x" | abs
"a" * 3 ~ [0] * 2 ~ 2 * "b" ~ "a" * -1
"a" | unknown_filter if false else "ok"
"a" is unknown_test if false else "ok"
"a" | unknown_filter if true else "ok"
"a" | unknown_filter
strftime_now("%Y") | length ~ strftime_now("%%")
"<a> & 'b'" | e ~ "<" | escape | e ~ 3 | e
"some words, and more of them" | truncate(10) ~ "some words" | truncate(10) ~ "some words" | truncate(5, true, "")
"some words" | truncate(2) ~ "x" * 300 | truncate
"some words, it's 4" | wordcount ~ "" | wordcount
"a".center(5, ".") ~ "a".ljust(3) ~ "a".rjust(3, "0") ~ "-4".zfill(5)
"{} {} {x:>5}|{x!s:^7}|".format(1, "b", x="c") ~ "{0:02d}{0:,}{1:.2f}".format(1234, 0.5) ~ "{{}}".format()
"{:%}".format(0.25) ~ "{:x}".format(255) ~ "{}".format(none) ~ "{}".format([1, "a"])
"{a}".format(b=1)
"{1}".format(1)
joiner("|")() ~ "x"
""".splitlines()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_evaluate_as_in_transformers(reference: Callable[..., str], expression: str) -> None:
    for source in ("{{ " + expression + " }}", "{% set x = " + expression + " %}|{{ x }}|"):
        theirs = outcome(lambda s=source: reference(s, HELLO), Exception)
        ours = outcome(lambda s=source: template_of(s).render(HELLO, add_generation_prompt=False), TemplateError)
        if theirs[0] == "rendered":
            assert ours == theirs
        else:
            assert ours[0] == "raised"


STATEMENTS = {
    "loop variables": "{% for c in 'abc' %}{{ [loop.index, loop.index0, loop.revindex, loop.revindex0, loop.first,"
    " loop.last, loop.length, loop.previtem, loop.nextitem, loop.depth, loop.cycle('x', 'y'), loop.changed(c)] }}"
    "{% endfor %}",
    "else of a loop": "{% for c in [] %}{{ c }}{% else %}none{% endfor %}",
    "filtered loop": "{% for m in [1, 2, 3, 4] if m is even %}{{ loop.length }}{{ m }} {% endfor %}",
    "recursive loop": "{% for i in [[1, [2]], [3]] recursive %}{{ loop.depth }}"
    "{{ loop(i) if i is iterable else i }}{% endfor %}",
    "unpacking": "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% set a, b = 1, 2 %}{{ b }}",
    "scopes": "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{{ x }}{% endfor %}{{ x }}"
    "{% if true %}{% set x = 3 %}{% endif %}{{ x }}{% with x = 4 %}{{ x }}{% endwith %}{{ x }}",
    "generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "macros": "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}"
    "{{ m(1) }}{{ m(1, 3, 4, c=5) }}",
    "macro with too much": "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}",
    "undefined argument": "{% macro m(a) %}{{ a }}{{ a is defined }}{% endmacro %}{{ m() }}",
    "call blocks": "{% macro m() %}<{{ caller(1) }}>{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}",
    "namespaces": "{% set n = namespace(a=[]) %}{% for i in [1, 2] %}"
    "{% set n.a = n.a + [i] %}{% endfor %}{{ n.a }}",
    "no namespace": "{% set n = {} %}{% set n.a = 1 %}",
    "loop controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}"
    "{% break %}{% endif %}{{ i }}{% endfor %}",
    "set blocks": "{% set x | upper %}a{{ 1 }}{% endset %}{{ x }}{% filter replace('a', 'b') %}aa{% endfilter %}",
    "whitespace": "  {% if true %}\n  a\n  {%- endif +%}\n\n  {# c #}\n b {{- 1 -}} \n"
    "{% raw %}{{ x }}{% endraw %}\n",
    "deep chain": "{{ " + " + ".join(["'x'"] * 40) + " }}",
    "lazy values": "{% set m = [1, 2] | map('string') %}{{ m | list }}{{ m | list }}"
    "{{ 'yes' if [] | select else 'no' }}",
    "string conversions": "{{ [1, 'a', none, {'b': 1.5}] ~ '' }}{{ {} }}{{ () }}{{ {'a': 1}.items() }}",
}


@pytest.mark.parametrize("source", STATEMENTS.values(), ids=STATEMENTS)
def test_statements_run_as_in_transformers(reference: Callable[..., str], source: str) -> None:
    assert_as_reference(reference, source, template_of(source), HELLO)


# --- hostile templates ----------------------------------------------------------------------------


def hostile(source: str) -> str | None:
    """Render a template, or return None if it is refused. Check that time is bounded and no argument changes."""
    messages = copy.deepcopy(HELLO)
    started = time.process_time()
    refusal = None
    try:
        written = ChatTemplate(source).render(messages)
    except TemplateError as error:
        refusal, written = error, None
    assert time.process_time() - started < PATIENCE
    assert messages == HELLO
    if refusal is not None:
        assert 0 < len(str(refusal)) < MAX_MESSAGE + 200
        # The error does not keep values of the template either.
        assert refusal.__cause__ is None
        assert refusal.__context__ is None
    return written


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_templates_can_reach_only_data(source: str) -> None:
    # Values that are not data are refused or undefined, and render as an empty text.
    assert not (hostile(source) or "").strip()


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_templates_that_use_too_much_are_refused(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(budget, "MAX_SECONDS", 1.0)
    assert hostile(source) is None


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_source_beyond_its_limits_is_refused(source: str) -> None:
    assert hostile(source) is None


def test_rendering_has_no_side_effects_and_bounded_memory() -> None:
    """Run in a process limited to 2.5 GiB, with unlimited recursion and with an audit hook."""
    run = """
        import json, resource, sys

        from erllama.chat.templates.compiler import FILENAME
        from erllama.chat.templates.template import ChatTemplate
        from erllama.errors import TemplateError

        messages = [{"role": "user", "content": "hello"}]
        ChatTemplate("{{ 'a' | title ~ strftime_now('%Y') ~ [1] | tojson(indent=1) }}").render(messages)
        with open(sys.argv[1]) as file:
            sources = json.load(file)
        resource.setrlimit(resource.RLIMIT_AS, (5 << 29, 5 << 29))
        sys.setrecursionlimit(10**6)
        happened = set()
        harmless = {"compile", "exec", "function.__new__", "object.__getattr__"}

        def heed(event, args):
            # For code that does not compile, Python looks for a file of the name that the code was given.
            if event not in harmless and (event, args[:1]) != ("open", (FILENAME,)):
                happened.add(event)

        sys.addaudithook(heed)
        for name, source in sources.items():
            try:
                ChatTemplate(source).render(messages)
            except TemplateError:
                pass
            assert not happened, (name, happened)
        print("held", len(sources))
    """
    sources = {**ESCAPES, **LARGE, **SOURCES}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(sources, file)
        file.flush()
        assert must_run(run, file.name, timeout=500).strip() == f"held {len(sources)}"


def test_lazy_values_of_lazy_values_do_not_nest() -> None:
    assert hostile(grown("n.s | select", start="[1]", times=99_999, then="{{ n.s | list }}")) == "[1]"


def test_a_rendering_ends_at_its_time_limit() -> None:
    template = ChatTemplate(BOMBS["loops of ifs"])
    with pytest.raises(TemplateError, match=r"more than 10 s|steps"):
        template.render(HELLO)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("{{ 1 }}\n\n{{ raise_exception('not ' ~ messages[0].role) }}", 3, "not user"),
        ("a\n{% macro m() %}\n{{ 1 / 0 }}\n{% endmacro %}\n{{ m() }}", 3, "division by zero"),
        ("\n{{ messages[0].name.first }}", 2, "'dict object' has no attribute 'name'"),
        ("\n\n{% for m in messages %}\n{{ m.content + none }}{% endfor %}", 4, "can only concatenate str"),
        ("\n{{ 2 ** 9999 }}", 2, "bits"),
        ("{% for m in messages recursive %}\n{{ loop([m]) }}{% endfor %}", 2, f"more than {MAX_CALLS} deep"),
    ],
)
def test_runtime_errors_name_the_template_line(source: str, line: int, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render(HELLO)
    assert caught.value.line == line
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("\n{{ 1 + }}", 2),
        ("\n\n{% if x %}", 3),
        ("{% for %}", 1),
        ("\n{% include 'x' %}", 2),
        ("\n{{ 1 | urlize }}", 2),
        ("\n\n{% import 'os' as os %}", 3),
        ("\n" + "{{ a" + ".a" * MAX_NESTING + " }}", 2),
        ("\n" + "{{ 1" + " ~ 1" * MAX_NODES + " }}", 2),
        ("{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}", None),
        ("x" * (MAX_SOURCE + 1), None),
    ],
)
def test_syntax_errors_name_the_template_line(source: str, line: int | None) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source)
    if line is not None:
        assert caught.value.line == line


@pytest.mark.parametrize("source", [None, 1, b"{{ 1 }}", Path("x")])
def test_a_template_must_be_text(source: object) -> None:
    with pytest.raises(OptionError):
        ChatTemplate(source)  # type: ignore[arg-type]


def cyclic() -> list[object]:
    cycle: list[object] = []
    cycle.append(cycle)
    return cycle


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


NOT_PLAIN = [b"x", object(), {1, 2}, print, Path("x"), 1j, cyclic(), deep(MAX_INPUT_DEPTH + 1), {(1,): 2}, 10**5000]


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda value: type(value).__name__)
def test_values_that_are_not_json_are_refused(value: object) -> None:
    template = ChatTemplate(SHORT)
    with pytest.raises(ChatError) as caught:
        template.render([*HELLO, {"role": "user", "content": {"a": [value]}}])
    assert caught.value.index == 1
    with pytest.raises(ChatError):
        template.render(HELLO, tools=[{"a": value}])
    with pytest.raises(ChatError):
        template.render(HELLO, documents=[{"a": value}])
    with pytest.raises(OptionError, match="colour"):
        template.render(HELLO, colour=value)


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, 1, None, iter(HELLO), b"x"])
def test_messages_must_be_a_list(messages: object) -> None:
    with pytest.raises(ChatError):
        ChatTemplate(SHORT).render(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize("message", ["hello", None, 1, ["role", "user"]])
def test_messages_must_be_mappings_and_errors_name_the_first_other(message: object) -> None:
    with pytest.raises(ChatError) as caught:
        ChatTemplate(SHORT).render([*HELLO, message, message])  # type: ignore[list-item]
    assert caught.value.index == 1


def test_conflicting_arguments_are_refused() -> None:
    template = ChatTemplate(TAGGED)
    with pytest.raises(OptionError, match="twice"):
        template.render(HELLO, messages=HELLO)
    with pytest.raises(OptionError, match="clashes"):
        template.render(HELLO, raise_exception="x")
    with pytest.raises(OptionError, match="messages"):
        ChatTemplate(TAGGED, special_tokens={"messages": "x"})
    with pytest.raises(OptionError, match="pad_token"):
        ChatTemplate(TAGGED, special_tokens={"pad_token": 1})  # type: ignore[dict-item]
    assert template.render(messages=HELLO) == template.render(HELLO)


@pytest.mark.parametrize("name", ["enable_thinkng", "add_generation_promt", "tool", "unlike_any", "self"])
def test_a_misspelled_argument_is_reported(name: str) -> None:
    template = ChatTemplate(TAGGED)
    if name in ("self", "unlike_any"):
        assert template.render(HELLO, **{name: True}) == template.render(HELLO)
    else:
        with pytest.raises(OptionError, match="did you mean"):
            template.render(HELLO, **{name: True})


@pytest.mark.parametrize(
    ("messages", "field", "message"),
    [
        ([], True, "no message"),
        ([{"role": "assistant"}], True, "no 'content'"),
        ([{"role": "assistant", "content": None}], True, "no 'content'"),
        ([{"role": "assistant", "content": {"a": 1}}], True, "no text"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], True, "no text"),
        ([{"role": "assistant", "content": "a"}], "reasoning_content", "no 'reasoning_content'"),
        ([{"role": "assistant", "content": "a", "reasoning_content": "b"}], "reasoning_content", "does not read"),
    ],
)
def test_messages_that_cannot_be_continued_are_refused(
    messages: Conversation, field: bool | str, message: str
) -> None:
    with pytest.raises(ChatError, match=message):
        ChatTemplate(SHORT).render(messages, continue_final_message=field)


def test_a_message_that_is_not_rendered_cannot_be_continued() -> None:
    with pytest.raises(TemplateError, match="last message") as caught:
        ChatTemplate("{{ messages[0].content }}").render([*HELLO, *HELLO], continue_final_message=True)
    assert caught.value.index == 1


# --- what is promised besides ---------------------------------------------------------------------


def test_a_message_is_continued_at_its_end() -> None:
    template = ChatTemplate(SHORT)
    begun = [*HELLO, {"role": "assistant", "content": "Once upon "}]
    assert template.render(begun, continue_final_message=True) == "user: hello\nassistant: Once upon "


def test_rendering_does_not_change_its_arguments() -> None:
    messages, tools = copy.deepcopy(CONVERSATIONS["call and result"]), [copy.deepcopy(WEATHER)]
    messages[-1]["thinking"] = "hm"
    before = copy.deepcopy((messages, tools))
    for source in OURS.values():
        for field in (False, True, "thinking"):
            with suppress(ChatError):
                ChatTemplate(source).render(messages, tools=tools, custom_tools=tools, continue_final_message=field)
    assert (messages, tools) == before


def test_values_derived_from_plain_data_are_plain() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    class Number(enum.IntEnum):
        ONE = 1

    template = ChatTemplate("{{ messages | tojson }}{{ x }}{{ messages[0].role.name }}")
    messages = [types.MappingProxyType({"role": Role.USER, "n": Number.ONE, "f": np.float64(1.5), "t": (1, 2)})]
    assert template.render(messages, x=Number.ONE) == '[{"role": "user", "n": 1, "f": 1.5, "t": [1, 2]}]1'


def test_uses_reports_the_variables_that_are_read() -> None:
    template = ChatTemplate(
        "{% set own = 1 %}{{ own }}{% if enable_thinking is defined %}{% endif %}{% macro m(given) %}{{ given }}"
        "{{ inside }}{% endmacro %}{% for t in tools %}{{ t.attribute }}{{ range(1) }}{% endfor %}"
        "{% if not later is defined %}{% set later = 1 %}{% endif %}"
    )
    read = ("enable_thinking", "inside", "tools", "later")
    assert all(map(template.uses, read))
    assert not any(map(template.uses, ("own", "given", "t", "attribute", "range", "messages", "self", "")))


def test_many_threads_can_render_one_template() -> None:
    template = ChatTemplate(BRACKETS)
    expected = [template.render([{"role": "user", "content": str(n)}]) for n in range(8)]
    wrong: list[object] = []

    def render(n: int) -> None:
        rendered = [template.render([{"role": "user", "content": str(n)}]) for _ in range(100)]
        wrong.extend(text for text in rendered if text != expected[n])

    threads = [threading.Thread(target=render, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_template_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(SHORT)
    assert render_chat_template(path, HELLO) == render_chat_template(SHORT, HELLO) == "user: hello\n"
    assert "weather" in render_chat_template(TAGGED, HELLO, [WEATHER])
    assert render_chat_template(TAGGED, HELLO, None, False).endswith("hello<|close|>\n")
    assert render_chat_template(TAGGED, HELLO, enable_thinking=False).endswith("</think>\n\n")
    path.write_bytes(b"\xff")
    with pytest.raises(TemplateError):
        render_chat_template(path, HELLO)
    with pytest.raises(FileNotFoundError):
        render_chat_template(tmp_path / "none", HELLO)


@pytest.mark.parametrize("source", TEMPLATES)
def test_a_conversation_of_megabytes_is_rendered(source: str) -> None:
    long: Conversation = []
    for n in range(1000):
        long.append({"role": "user", "content": f"question {n}: " + "why is it so? é " * 100})
        long.append({"role": "assistant", "content": f"answer {n}: " + "because it is.\n" * 200})
    long.append({"role": "user", "content": "and now?"})
    rendered = template_of(source).render(long, tools=[WEATHER])
    assert len(rendered) > 50_000
    if source != ALL["mixed"]:  # its loop ends early
        assert "question 999" in rendered


def test_a_text_of_half_the_limit_is_rendered() -> None:
    content = "x" * (MAX_TEXT // 2)
    assert len(ChatTemplate(TAGGED).render([{"role": "user", "content": content}])) > len(content)
