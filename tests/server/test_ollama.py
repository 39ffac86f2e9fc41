"""Ollama's API, as its own client calls it: replies, their parts, and what the models are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import datetime

import httpx
import numpy as np
import ollama
import pytest

import erllama
from erllama.engine.backend import InfillTokens
from support.chat.scripted_model import CALL, TEMPLATE, TOOLS, VOCABULARY, model_replying
from support.doc_pages import blocks
from support.http_server import running_server
from support.ollama_server import WAIT, ollama_client
from support.scripted_backend import EOG, PieceVocabulary, ScriptedBackend

QUESTION = [{"role": "user", "content": "hello?"}]
THINKING = "<think>hm</think>hello there"


@pytest.fixture(scope="module")
def demo() -> Iterator[ollama.Client]:
    """A client of a server of the demo model."""
    with erllama.Cache() as cache:
        model = erllama.load_model(erllama.demo_model(), id="demo", cache=cache, n_ctx=512, n_threads=1)
        with ollama_client(model) as client:
            yield client


# --- chat -----------------------------------------------------------------------------------------------


def test_a_chat_returns_the_whole_reply() -> None:
    with ollama_client(model_replying("hello there")) as client:
        reply = client.chat("any", QUESTION)
        assert (reply.message.role, reply.message.content) == ("assistant", "hello there")
        assert (reply.done, reply.done_reason) == (True, "stop")
        assert reply.message.tool_calls is None
        assert reply.message.thinking is None


def test_a_streamed_chat_has_the_text_in_parts() -> None:
    with ollama_client(model_replying("hello there")) as client:
        *parts, last = client.chat("any", QUESTION, stream=True)
        assert "".join(part.message.content or "" for part in parts) == "hello there"
        assert not any(part.done for part in parts)
        assert (last.done, last.done_reason, last.message.content) == (True, "stop", "")
        assert last.eval_count == len("hello there")


def test_a_reply_is_a_stream_of_json_lines_by_default() -> None:
    with ollama_client(model_replying("hello there")) as client:
        answer = client._client.post("/api/chat", json={"messages": QUESTION})
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        assert len({line["model"] for line in lines}) == 1


def test_counts_and_durations_are_those_of_the_reply() -> None:
    with ollama_client(model_replying("hello there")) as client:
        first, again = client.chat("any", QUESTION), client.chat("any", QUESTION)
        assert first.prompt_eval_count == again.prompt_eval_count
        assert first.eval_count == len("hello there")
        for reply in (first, again):
            parts = (reply.load_duration, reply.prompt_eval_duration, reply.eval_duration)
            assert all(isinstance(part, int) and part >= 0 for part in parts)
            assert (reply.total_duration or 0) >= sum(part or 0 for part in parts)
        assert first.created_at is not None
        assert datetime.fromisoformat(first.created_at).tzinfo is not None


def test_the_answer_says_how_much_of_the_prompt_was_cached() -> None:
    with ollama_client(model_replying("hello there")) as client:
        body = {"messages": QUESTION, "stream": False}
        first, again = (client._client.post("/api/chat", json=body).json() for _ in range(2))
        assert (first["prompt_cached_count"], first["prompt_cached_tier"]) == (0, None)
        assert again["prompt_cached_count"] == again["prompt_eval_count"] - 1


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_apart_from_the_answer(stream: bool) -> None:
    with ollama_client(model_replying(THINKING)) as client:
        answer = client.chat("any", QUESTION, think=True, stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(part.message.thinking or "" for part in parts) == "hm"
        assert "".join(part.message.content or "" for part in parts) == "hello there"


def test_a_level_of_thinking_reaches_the_template() -> None:
    template = TEMPLATE + "{%- if reasoning_effort %}{{ reasoning_effort }}\t{% endif %}"
    model = model_replying("hello there", template=template)
    with ollama_client(model) as client:
        plain = client.chat("any", QUESTION)
        low = client.chat("any", QUESTION, think="low")
        assert (low.prompt_eval_count or 0) == (plain.prompt_eval_count or 0) + len("low\t")


def test_a_model_that_cannot_think_refuses_to(tiny: erllama.Model) -> None:
    with ollama_client(tiny) as client:
        with pytest.raises(ollama.ResponseError, match="does not support thinking") as refused:
            client.chat("any", QUESTION, think=True)
        assert refused.value.status_code == 400
        assert client.chat("any", QUESTION, think=False, options={"num_predict": 1}).done


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_have_their_arguments_as_objects(stream: bool) -> None:
    with ollama_client(model_replying(f"Let me see. {CALL}", "It is noon.")) as client:
        answer = client.chat("any", QUESTION, tools=TOOLS, stream=stream)
        parts = list(answer) if stream else [answer]
        calls = [call for part in parts for call in part.message.tool_calls or ()]
        assert [(call.function.name, call.function.arguments) for call in calls] == [("get_time", {"city": "Oslo"})]
        assert "".join(part.message.content or "" for part in parts).strip() == "Let me see."
        assert parts[-1].done_reason == "stop"


def test_a_conversation_with_a_tool_computes_only_what_is_new() -> None:
    model = model_replying(f"Let me see. {CALL}", "It is noon.")
    with ollama_client(model) as client:
        first = client.chat("any", QUESTION, tools=TOOLS)
        messages = [*QUESTION, first.message, {"role": "tool", "tool_name": "get_time", "content": "12:00"}]
        second = client.chat("any", messages, tools=TOOLS)
        assert second.message.content == "It is noon."
        hit = model.last_cache_hit
        assert hit is not None
        assert hit.tokens >= (first.prompt_eval_count or 0) + (first.eval_count or 0)


def test_results_without_a_name_answer_the_calls_in_order() -> None:
    with ollama_client(model_replying("It is noon.")) as client:
        calls = [{"function": {"name": "get_time", "arguments": {"city": city}}} for city in ("Oslo", "Rome")]
        results = [{"role": "tool", "content": time} for time in ("12:00", "13:00")]
        messages = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
        assert client.chat("any", messages, tools=TOOLS).message.content == "It is noon."
        with pytest.raises(ollama.ResponseError, match="message 3"):
            client.chat("any", [*messages[:3], {"role": "tool", "tool_name": "other", "content": "x"}], tools=TOOLS)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_violates_its_schema_stays_text(stream: bool) -> None:
    city = {"type": "string", "not": {"const": "Oslo"}}  # no grammar enforces it
    parameters = {"type": "object", "properties": {"city": city}}
    tools = [{"type": "function", "function": {"name": "get_time", "description": "", "parameters": parameters}}]
    with ollama_client(model_replying(f"hello{CALL}")) as client:
        body = {"messages": QUESTION, "tools": tools, "stream": stream}
        lines = [json.loads(line) for line in client._client.post("/api/chat", json=body).text.splitlines()]
        assert "".join(line["message"]["content"] for line in lines) == f"hello{CALL}"
        assert not any("tool_calls" in line["message"] for line in lines)


def test_a_format_constrains_the_reply(demo: ollama.Client) -> None:
    options = {"num_predict": 60, "temperature": 0.0}
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    closed = schema | {"additionalProperties": False}
    reply = demo.chat("demo", QUESTION, format=closed, options=options, think=False)
    assert list(json.loads(reply.message.content or "")) == ["ok"]
    free = demo.generate("demo", "hello?", format="json", options=options, think=False)
    assert free.response.startswith("{")


def test_options_change_the_reply() -> None:
    with ollama_client(model_replying("hello there")) as client:
        cut = client.chat("any", QUESTION, options={"num_predict": 3})
        assert (cut.message.content, cut.done_reason) == ("hel", "length")
        stopped = client.chat("any", QUESTION, options={"stop": ["lo"], "num_predict": -1})
        assert (stopped.message.content, stopped.done_reason) == ("hel", "stop")
        filters = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "seed": 1}
        penalties = {"repeat_penalty": 1.1, "repeat_last_n": 64, "presence_penalty": 0.1, "frequency_penalty": 0.1}
        others = {"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "num_ctx": 2048, "num_gpu": 1}
        assert client.chat("any", QUESTION, options=filters | penalties | others).done


def test_equal_seeds_give_equal_replies(demo: ollama.Client) -> None:
    options = {"seed": 5, "temperature": 2.0, "num_predict": 20}
    one, two = (demo.generate("demo", "Tell me a story.", options=options).response for _ in range(2))
    other = demo.generate("demo", "Tell me a story.", options=options | {"seed": 6}).response
    assert one == two != other


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_most_likely_tokens(stream: bool) -> None:
    with ollama_client(model_replying("hello there")) as client:
        answer = client.chat("any", QUESTION, logprobs=True, top_logprobs=2, stream=stream)
        parts = list(answer) if stream else [answer]
        found = [each for part in parts for each in part.logprobs or ()]
        assert "".join(each.token for each in found).startswith("hello there")
        assert all(each.logprob <= 0 and len(each.top_logprobs or ()) == 2 for each in found)


# --- generate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_answered_by_the_template(stream: bool) -> None:
    with ollama_client(model_replying(THINKING)) as client:
        answer = client.generate("any", "hello?", system="Be kind.", think=True, stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(part.response or "" for part in parts) == "hello there"
        assert "".join(part.thinking or "" for part in parts) == "hm"
        text = VOCABULARY.detokenize(list(parts[-1].context or ()), special=True).decode()
        assert text.startswith("<|system|>Be kind.<|end|><|user|>hello?<|end|><|assistant|>\t<think>")


def test_a_context_continues_where_the_reply_ended() -> None:
    model = model_replying("hello there", "name")
    with ollama_client(model) as client:
        first = client.generate("any", "hello?", system="Be kind.")
        second = client.generate("any", "who? <|end|>", context=first.context, system="Be kind.")
        assert (first.response, second.response) == ("hello there", "name")
        assert first.context is not None
        assert second.context is not None
        assert second.context[: len(first.context)] == first.context
        assert model.last_cache_hit is not None
        assert model.last_cache_hit.tokens == len(first.context)
        added = VOCABULARY.detokenize(second.context[len(first.context) :], special=True).decode()
        assert added == "<|end|><|user|>who? <|end|><|end|><|assistant|>\tname"
        assert list(second.context).count(EOG) == 4, "the end token in the prompt is plain text"


def test_a_raw_prompt_reaches_the_model_as_it_is() -> None:
    with ollama_client(model_replying("hello there")) as client:
        reply = client.generate("any", "<|user|>x<|assistant|>\t", raw=True)
        assert reply.response == "hello there"
        assert reply.prompt_eval_count == 4
        assert reply.context is None
        with pytest.raises(ollama.ResponseError, match="raw and system together"):
            client.generate("any", "x", raw=True, system="Be kind.")


def test_a_suffix_asks_for_the_text_in_the_gap() -> None:
    vocabulary = PieceVocabulary((), ["<pre>", "<suf>", "<mid>"])
    pre, suf, mid = vocabulary.special.values()
    vocabulary.infill_tokens = InfillTokens((), pre, suf, mid)  # type: ignore[attr-defined]

    def fill(tokens: list[int]) -> int:
        reply = b"middle"
        n = tokens[::-1].index(mid)
        assert tokens[: len(tokens) - n] == [pre, *b"before", suf, *b"after", mid]
        return reply[n] if n < len(reply) else EOG

    model = erllama.load_backend(ScriptedBackend(vocabulary, fill), cache=erllama.Cache())
    with ollama_client(model) as client:
        for stream in (False, True):
            answer = client.generate("any", "before", suffix="after", stream=stream)
            assert "".join(part.response or "" for part in (answer if stream else [answer])) == "middle"


def test_a_model_without_gap_tokens_refuses_a_suffix() -> None:
    with ollama_client(model_replying("hello there")) as client:
        with pytest.raises(ollama.ResponseError, match="cannot fill gaps") as refused:
            client.generate("any", "before", suffix="after")
        assert refused.value.status_code == 400


def test_a_request_without_a_prompt_says_that_the_model_is_loaded() -> None:
    model = model_replying("hello there")
    with ollama_client(model) as client:
        for reply in (client.generate("any", keep_alive="5m"), client.generate("any", keep_alive=0)):
            assert (reply.response, reply.done, reply.done_reason) == ("", True, "load")
        chat = client.chat("any", [], keep_alive=-1)
        assert (chat.message.content, chat.done_reason) == ("", "load")
        assert [part.done_reason for part in client.generate("any", stream=True)] == ["load"]
        assert model.metrics.finished == {}


# --- embeddings and models ------------------------------------------------------------------------------


def test_embeddings_are_the_vectors_of_the_model(demo: ollama.Client) -> None:
    texts = ["hello", "a longer text"]
    with erllama.load_model(erllama.demo_model(), cache=erllama.Cache(), n_ctx=512, n_threads=1) as model:
        expected, plain = model.embed(texts), model.embed(texts[0], normalize=False)
        n_tokens = sum(len(model.tokenize(text)) for text in texts)
    reply = demo.embed("demo", texts)
    np.testing.assert_allclose(np.array(reply.embeddings), expected, atol=1e-5)
    assert reply.prompt_eval_count == n_tokens
    np.testing.assert_allclose(demo.embed("demo", texts[0]).embeddings, expected[:1], atol=1e-5)
    np.testing.assert_allclose(demo.embeddings("demo", texts[0]).embedding, plain[0], rtol=1e-4)
    short = np.array(demo.embed("demo", texts, dimensions=8).embeddings)
    assert short.shape == (2, 8)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1.0, atol=1e-5)
    assert demo.embed("demo", []).embeddings == []


def test_a_text_that_is_too_long_is_cut_unless_told_otherwise(demo: ollama.Client) -> None:
    long = "hello " * 2000
    assert len(demo.embed("demo", long).embeddings) == 1
    with pytest.raises(ollama.ResponseError) as refused:
        demo.embed("demo", long, truncate=False)
    assert refused.value.status_code == 400


def test_models_are_listed_with_their_size_and_family(demo: ollama.Client) -> None:
    (listed,), (loaded,) = demo.list().models, demo.ps().models
    assert listed.model == loaded.model == "demo"
    assert listed.size == erllama.demo_model().stat().st_size
    assert listed.details is not None
    assert (listed.details.format, listed.details.family) == ("gguf", "llama")
    assert listed.details.parameter_size == "1.8M"
    assert listed.digest == loaded.digest
    assert loaded.context_length == 512
    assert loaded.size_vram == 0
    assert loaded.expires_at is not None
    assert loaded.expires_at.year == 9999


def test_a_model_is_described_by_its_metadata(demo: ollama.Client) -> None:
    shown = demo.show("demo")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["tokenizer.ggml.tokens"] is None
    assert shown.template
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities or ())
    everything = demo._client.post("/api/show", json={"name": "demo", "verbose": True}).json()
    assert len(everything["model_info"]["tokenizer.ggml.tokens"]) > 100


def test_clients_find_the_server_and_its_version(demo: ollama.Client) -> None:
    assert demo._client.head("/").status_code == 200
    version = demo._client.get("/api/version").json()
    assert version["erllama_version"] == erllama.__version__
    assert [int(part) for part in version["version"].split(".")] >= [0, 9, 0], "Ollama's; older clients compare it"


def test_the_asyncio_client_calls_the_same_api(demo: ollama.Client) -> None:
    async def use(client: ollama.AsyncClient) -> None:
        options = {"num_predict": 8, "temperature": 0.0}
        whole = await client.chat("demo", QUESTION, options=options)
        parts = [part async for part in await client.chat("demo", QUESTION, stream=True, options=options)]
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        written = await client.generate("demo", "hello?", options=options)
        streamed = [part async for part in await client.generate("demo", "hello?", stream=True, options=options)]
        assert "".join(part.response or "" for part in streamed) == written.response
        assert len((await client.embed("demo", "hello")).embeddings) == 1
        assert len((await client.embeddings("demo", "hello")).embedding) > 0
        assert [model.model for model in (await client.list()).models] == ["demo"]
        assert [model.model for model in (await client.ps()).models] == ["demo"]
        assert (await client.show("demo")).details is not None
        await client.close()

    asyncio.run(use(ollama.AsyncClient(str(demo._client.base_url), timeout=WAIT)))


# --- names and keys -------------------------------------------------------------------------------------


def test_models_are_found_by_name_and_by_ollamas_tag() -> None:
    def load(id: str) -> erllama.Model:
        return erllama.load_backend(
            ScriptedBackend(VOCABULARY, [*id.encode()], chat_templates={"default": TEMPLATE}),
            id=id,
            cache=erllama.Cache(),
        )

    with ollama_client(load("one"), load("two")) as client:
        assert client.chat("two:latest", QUESTION).message.content == "two"
        assert client.generate("one", "hello?").response == "one"
        with pytest.raises(ollama.ResponseError, match="'three'") as missing:
            client.chat("three", QUESTION)
        assert missing.value.status_code == 404


def test_a_key_sees_only_its_models() -> None:
    models = [model_replying("hello there"), model_replying("name")]
    keys = (erllama.server.ApiKey(secret="k", models=(models[1].id,)),)
    try:
        with running_server(models, keys=keys) as server:
            assert httpx.head(server.url).status_code == 200
            assert httpx.get(f"{server.url}/api/tags", timeout=120).json()["error"].startswith("a key is needed")
            client = ollama.Client(server.url, headers={"authorization": "Bearer k"})
            assert [each.model for each in client.list().models] == [models[1].id]
            with pytest.raises(ollama.ResponseError) as refused:
                client.chat(models[0].id, QUESTION)
            assert refused.value.status_code == 403
            client.close()
    finally:
        for model in models:
            model.unload()


def test_the_example_of_the_page_runs(demo: ollama.Client, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("docs/server/ollama.md", "python")
    names: dict[str, object] = {}
    exec(example.text.replace("http://127.0.0.1:8080", str(demo._client.base_url)), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert capsys.readouterr().out
