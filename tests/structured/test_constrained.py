"""Replies under a grammar always follow it, regardless of what the model prefers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Iterator

import jsonschema
import numpy as np
import pytest

import erllama
from erllama.cache import Cache
from erllama.engine.backends.stub import StubBackend
from erllama.engine.grammar import llguidance_adapter
from erllama.testing.models import write_llama
from support.recording_backend import RecordingBackend

N = int(os.environ.get("ERLLAMA_GRAMMARS", "20"))  # `make stress` runs more
HOT = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture
def stub() -> Iterator[erllama.Model]:
    with Cache() as cache, erllama.load_backend(StubBackend(), cache=cache) as model:
        yield model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[erllama.Model]:
    """Random weights, so only the mask makes a reply follow its grammar."""
    path = write_llama(tmp_path_factory.mktemp("models") / "words.gguf")
    with Cache() as cache, erllama.load_model(path, cache=cache, n_ctx=4096, n_seq_max=4, n_threads=1) as found:
        yield found


# --- random grammars, and an independent judge of each --------------------------------------------------------


def schema(dice: random.Random, depth: int = 0) -> dict[str, object]:
    """A schema whose every instance is short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern"]
    kind = dice.choice(kinds + ["object", "array", "anyOf"] * (depth < 3))
    if kind == "string":
        return {"type": "string", "maxLength": dice.randrange(6)}
    if kind == "integer":
        low = dice.randrange(-500, 500)
        return {"type": "integer", "minimum": low, "maximum": low + dice.randrange(1000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 1}
    if kind == "enum":
        return {"enum": dice.sample(["red", "green", 1, 2.5, None, True, {"a": [1]}, "naïve"], 3)}
    if kind == "pattern":
        return {"type": "string", "pattern": dice.choice(["^[a-c]{1,4}$", "^(yes|no)$", "^[0-9]{3}-[0-9]{2}$"])}
    if kind == "object":
        names = dice.sample(["a", "b", "name", "über", "x y"], dice.randrange(4))
        return {
            "type": "object",
            "properties": {name: schema(dice, depth + 1) for name in names},
            "required": dice.sample(names, dice.randrange(len(names) + 1)),
            "additionalProperties": False,
        }
    if kind == "array":
        return {"type": "array", "items": schema(dice, depth + 1), "maxItems": dice.randrange(4)}
    if kind == "anyOf":
        return {"anyOf": [schema(dice, depth + 1) for _ in range(2)]}
    return {"type": kind}


def expression(dice: random.Random, depth: int = 0) -> tuple[str, str]:
    """Draw a language, as GBNF and as a Python regular expression."""
    kind = dice.choice(["text", "class", "not"] + ["seq", "alt", "repeat"] * (depth < 4))
    if kind == "text":
        text = "".join(dice.choices('abc é☃\n"\\]', k=dice.randrange(1, 4)))
        return json.dumps(text, ensure_ascii=dice.random() < 0.5), re.escape(text)
    if kind == "class":
        return "[a-c0-9é-]", "[a-c0-9é-]"
    if kind == "not":
        return r"[^a-y\]\n]", r"[^a-y\]\n]"
    parts = [expression(dice, depth + 1) for _ in range(dice.randrange(1, 4))]
    if kind == "seq":
        return f"({' '.join(gbnf for gbnf, _ in parts)})", f"(?:{''.join(pattern for _, pattern in parts)})"
    if kind == "alt":
        return f"({' | '.join(gbnf for gbnf, _ in parts)})", f"(?:{'|'.join(pattern for _, pattern in parts)})"
    times = dice.choice(["?", "{0,3}", "{2}", "{1,4}"])
    return f"({parts[0][0]}){times}", f"(?:{parts[0][1]}){times}"


@pytest.mark.parametrize("part", range(4))
def test_every_constrained_reply_parses(model: erllama.Model, part: int) -> None:
    for seed in range(part, N, 4):
        dice = random.Random(seed)
        options = {**HOT, "max_tokens": 3000, "seed": seed}
        if seed % 3 == 0:
            asked = schema(dice)
            reply = model.complete("x", json_schema=asked, **options)  # type: ignore[arg-type]
            assert reply.finish_reason == "stop", f"seed {seed}: {asked}: {reply.text[:200]!r}"
            jsonschema.validate(json.loads(reply.text), asked)
        else:
            gbnf, pattern = expression(dice)
            kept = {"grammar": f"root ::= {gbnf}"} if seed % 3 == 1 else {"regex": pattern}
            reply = model.complete("x", **kept, **options)  # type: ignore[arg-type]
            assert reply.finish_reason == "stop", f"seed {seed}: {pattern}: {reply.text[:200]!r}"
            assert re.fullmatch(pattern, reply.text), f"seed {seed}: {reply.text!r} does not match {pattern!r}"


def test_concurrent_replies_follow_their_own_grammars(model: erllama.Model) -> None:
    ends = np.flatnonzero(model._backend.vocabulary.is_eog).tolist()

    async def ask() -> list[erllama.Completion]:
        return await asyncio.gather(
            *(model.acomplete("x", regex=f"[{letter}]{{5,50}}", max_tokens=60, **HOT) for letter in "abcd"),  # type: ignore[arg-type]
            model.acomplete("x", max_tokens=60, banned_tokens=ends, **HOT),  # type: ignore[arg-type]
        )

    *kept, free = asyncio.run(ask())
    for letter, reply in zip("abcd", kept, strict=True):
        assert re.fullmatch(f"{letter}{{5,50}}", reply.text)
    assert len(free.tokens) == 60
    assert len(set(free.tokens)) > 20


# --- ends, forced stretches, other options --------------------------------------------------------------------


def test_a_reply_ends_exactly_where_its_grammar_ends(stub: erllama.Model) -> None:
    for seed in range(20):
        reply = stub.complete("x", regex="[ab]{7}", max_tokens=50, seed=seed, **HOT)  # type: ignore[arg-type]
        assert len(reply.text) == 7
        assert reply.finish_reason == "stop"
    lengths = {
        len(stub.complete("x", regex="[ab]{2,9}", max_tokens=50, seed=seed, **HOT).text)  # type: ignore[arg-type]
        for seed in range(60)
    }
    assert lengths <= set(range(2, 10))
    assert len(lengths) > 4, "a reply that may continue sometimes does"


def test_forced_tokens_are_computed_in_one_decode() -> None:
    text = "The quick brown fox jumps over the lazy dog "
    backend = RecordingBackend(StubBackend())
    with Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        reply = model.complete("x", regex=f"{text}[0-9]", max_tokens=100, seed=1)
        n_decodes = len(backend.slices)
        assert re.fullmatch(f"{text}[0-9]", reply.text)
        assert len(reply.tokens) == len(text) + 1
        assert n_decodes < 10
        with_logprobs = model.complete("x", regex=f"{text}[0-9]", max_tokens=100, seed=1, logprobs=0)
        assert with_logprobs.logprobs is not None
        assert len(with_logprobs.logprobs) == len(with_logprobs.tokens) == len(reply.tokens)
        # It ends at the same place, and the same is stored, as token by token.
        for n in (0, 1, 5, len(text), len(text) + 1):
            cut = model.complete("x", regex=f"{text}[0-9]", max_tokens=n, seed=1)
            assert cut.tokens == reply.tokens[:n]
            assert cut.finish_reason == "length"
        again = model.complete(list(reply.context_tokens), max_tokens=1)
        assert (again.cache.kind, again.cache.tokens) == ("exact", len(text) + 1)
        stopped = model.complete("x", regex=f"{text}[0-9]", stop="fox", max_tokens=100)
        assert stopped.text == text[: text.index("fox")]
        assert stopped.stop_sequence == "fox"
        with model.stream("x", regex=f"{text}[0-9]", max_tokens=100, seed=1) as stream:
            pieces = [event for event in stream if isinstance(event, erllama.TextDelta)]
        assert "".join(piece.text for piece in pieces) == reply.text
        assert tuple(token for piece in pieces for token in piece.tokens) == reply.tokens


def test_a_forced_stretch_ends_with_the_context() -> None:
    with Cache() as cache, erllama.load_backend(StubBackend(n_ctx=64), cache=cache) as model:
        reply = model.complete("x" * 40, regex="a{200}")
    assert reply.finish_reason == "context_full"
    assert reply.text == "a" * 25
    assert len(reply.context_tokens) == 65


@pytest.mark.parametrize("warm", [False, True])
def test_a_reproducible_constrained_reply_equals_the_cold_one(model: erllama.Model, warm: bool) -> None:
    prompt, pattern = f"begin, {warm}: " * 20, "(one two three four five six [0-9]{3} ){4}"
    options = {"regex": pattern, "max_tokens": 300, "seed": 3, **HOT}
    first = model.complete(prompt, reproducible=True, **options)  # type: ignore[arg-type]
    if not warm:
        model.evict()
    again = model.complete(prompt, reproducible=True, **options)  # type: ignore[arg-type]
    assert first.cache.tokens <= 1, "at most the first token, which all prompts share"
    assert again.cache.kind == "exact"
    assert again.tokens == first.tokens
    assert re.fullmatch(pattern, first.text)


def test_a_cached_reply_follows_its_grammar(model: erllama.Model) -> None:
    pattern = "(one two three four five six [0-9]{3} ){4}"
    replies = [model.complete("warm " * 20, regex=pattern, max_tokens=300, seed=seed, **HOT) for seed in range(4)]  # type: ignore[arg-type]
    assert [reply.cache.kind for reply in replies[1:]] == ["exact"] * 3
    assert all(re.fullmatch(pattern, reply.text) for reply in replies)


def test_preempted_requests_keep_their_grammars() -> None:
    with Cache(block_size=32) as cache:
        with erllama.load_backend(StubBackend(n_ctx=256), cache=cache, n_seq_max=4) as model:
            options = {"regex": "([a-c]{3}-forced-){20}", "max_tokens": 150, **HOT}
            alone = [model.complete([seed] * 50, seed=seed, **options) for seed in range(1, 5)]  # type: ignore[arg-type]
            model.evict()
            streams = [model.stream([seed] * 50, seed=seed, **options) for seed in range(1, 5)]  # type: ignore[arg-type]
            together = [stream.result() for stream in streams]
            assert model.metrics.preempted > 0
    assert [reply.text for reply in together] == [reply.text for reply in alone]


# --- triggers ---------------------------------------------------------------------------------------------


def test_a_grammar_begins_at_its_trigger(stub: erllama.Model) -> None:
    seen = 0
    for seed in range(40):
        reply = stub.complete(
            "x",
            grammar='root ::= ("q" | "z") [0-9]{3}',
            grammar_triggers=["q", "z"],
            max_tokens=200,
            seed=seed,
            temperature=2.0,
            banned_tokens=[256],
        )
        found = re.fullmatch("([^qz]*)([qz][0-9]{3})?", reply.text, re.DOTALL)
        if found is None or not found[2]:
            assert reply.finish_reason == "length"
            assert not set("qz") & set(reply.text)
        else:
            seen += 1
            assert reply.finish_reason == "stop"
    assert seen > 5


def test_a_trigger_is_found_across_tokens_and_as_a_token(stub: erllama.Model) -> None:
    biased = {ord(letter): 1000.0 for letter in "a"}
    reply = stub.complete(
        "x", grammar='root ::= "aaa" "!"', grammar_triggers="aaa", max_tokens=20, logit_bias=biased
    )
    assert reply.text == "aaa!"
    reply = stub.complete(
        "x", grammar='root ::= <[98]> "!"', grammar_triggers=[98], max_tokens=20, logit_bias={98: 1000.0}
    )
    assert reply.text == "b!"


# --- what is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grammar": 'root ::= "a"', "regex": "a"}, "grammar and regex together"),
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex together"),
        ({"grammar": "root ::= (", "max_tokens": 5}, "line 1"),
        ({"grammar": ""}, "empty"),
        ({"grammar": "root ::= root"}, ""),
        ({"grammar": 'root ::= "a" root'}, ""),
        ({"grammar": 5}, "GBNF"),
        ({"regex": "a("}, ""),
        ({"regex": 5}, "pattern"),
        ({"json_schema": "{"}, "line 1"),
        ({"json_schema": {"type": "strin"}}, "strin"),
        ({"json_schema": 5}, "schema"),
        ({"json_schema": {"type": "object", "propertyNames": {"pattern": "^a"}}}, "propertyNames"),
        ({"grammar_triggers": ["a"]}, "without a grammar"),
        ({"grammar": 'root ::= "a"', "grammar_triggers": [""]}, "empty"),
        ({"grammar": 'root ::= "a"', "grammar_triggers": [-1]}, "at least 0"),
        ({"grammar": "root ::= <nobody-has-this>"}, "nobody-has-this"),
        ({"grammar": "root ::= <[99999]>"}, "99999"),
    ],
)
def test_wrong_grammars_are_refused_before_the_first_token(
    stub: erllama.Model, options: dict[str, object], words: str
) -> None:
    before = stub.metrics.ticks
    with pytest.raises(erllama.OptionError) as caught:
        stub.complete("x", **options)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert stub.metrics.ticks == before


def test_a_grammar_without_a_continuation_ends_only_its_request(stub: erllama.Model) -> None:
    with stub.stream("other", max_tokens=50, seed=1) as other:
        with pytest.raises(erllama.SamplingError, match="exclude every token"):
            stub.complete("x", regex="[0-9]", banned_tokens=list(range(256)), max_tokens=5)
        with pytest.raises(erllama.GrammarError, match="not allowed by the grammar here"):
            stub.complete(
                "x",
                grammar='root ::= "ab"',
                grammar_triggers=[ord("b")],
                logit_bias={ord("b"): 1000.0},
                max_tokens=5,
            )
        assert other.result().tokens == stub.complete("other", max_tokens=50, seed=1).tokens


# --- ahead of time ------------------------------------------------------------------------------------------


def test_a_grammar_compiled_ahead_is_not_compiled_again(
    stub: erllama.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar, other = erllama.Grammar.regex("[ab]{3}"), erllama.Grammar.regex("[cd]{3}")
    compiled: list[str] = []
    compile_ = llguidance_adapter.compile_grammar

    def recorded(tokens: llguidance_adapter.GuidanceVocabulary, written: str) -> object:
        compiled.append(written)
        return compile_(tokens, written)

    monkeypatch.setattr(llguidance_adapter, "compile_grammar", recorded)
    stub.compile_grammar(grammar)
    assert len(compiled) == 1
    assert re.fullmatch("[ab]{3}", stub.complete("x", grammar=grammar, **HOT).text)  # type: ignore[arg-type]
    assert len(compiled) == 1
    assert re.fullmatch("[cd]{3}", stub.complete("x", grammar=other, **HOT).text)  # type: ignore[arg-type]
    assert len(compiled) == 2


def test_compiling_ahead_refuses_the_same_grammars_as_a_request(stub: erllama.Model) -> None:
    with pytest.raises(erllama.GrammarError, match="line 1, column 10: token 99999 is outside") as caught:
        stub.compile_grammar(erllama.Grammar.gbnf("root ::= <[99999]>"))
    assert (caught.value.line, caught.value.column) == (1, 10)
    with pytest.raises(erllama.OptionError, match=r"pass an erllama\.Grammar"):
        stub.compile_grammar('root ::= "a"')  # type: ignore[arg-type]
    stub.unload()
    with pytest.raises(erllama.ModelUnloaded):
        stub.compile_grammar(erllama.Grammar.regex("a"))


def test_grammars_can_test_texts_without_a_model() -> None:
    number = erllama.Grammar.gbnf('root ::= "-"? [0-9]+ ("." [0-9]+)?')
    assert number.accepts("-12.5")
    assert not number.accepts("12.")
    assert erllama.Grammar.json_schema({"type": "array", "items": {"type": "integer"}}).accepts("[1, 2]")
    assert not erllama.Grammar.regex("a|b").accepts("ab")
    assert erllama.Grammar.lark('start: "a" B\nB: /b+/').accepts(b"abb")


# --- what cannot be written -------------------------------------------------------------------


def nested(levels: int, make: Callable[[object], object]) -> object:
    value: object = {}
    for _ in range(levels):
        value = make(value)
    return value


@pytest.mark.parametrize("option", ["json_schema", "regex", "grammar", "stop", "max_tokens", "temperature"])
@pytest.mark.parametrize("make", [lambda inner: {"items": inner}, lambda inner: [inner]], ids=["objects", "lists"])
def test_an_endlessly_nested_option_is_refused(option: str, make: Callable[[object], object]) -> None:
    with erllama.load_backend(StubBackend()) as model, pytest.raises(erllama.OptionError) as caught:
        model.complete("x", **{option: nested(100_000, make)})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300
    if option == "json_schema" and isinstance(make({}), dict):
        assert isinstance(caught.value, erllama.GrammarError)
        assert "nested too deeply" in str(caught.value)


def test_an_integer_of_too_many_digits_is_refused_with_its_option() -> None:
    with erllama.load_backend(StubBackend()) as model:
        for option in ("temperature", "seed", "json_schema", "regex"):
            with pytest.raises(erllama.OptionError):
                model.complete("x", **{option: 10**5000})  # type: ignore[arg-type]
        with pytest.raises(erllama.GrammarError, match="not JSON"):
            model.complete("x", json_schema={"const": 10**5000})
