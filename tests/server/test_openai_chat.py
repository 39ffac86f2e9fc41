"""`/v1/chat/completions`, as the official client calls it: whole replies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import openai
import pydantic
import pytest

import erllama
from erllama.server.openai.chat_options import ChatBody
from support.chat.scripted_model import CALL, SPECIAL, TEMPLATE, TOOLS, VOCABULARY, model_replying
from support.http_server import running_server
from support.openai_server import USER, Json, client_of, openai_client, record_prompts
from support.scripted_backend import ScriptedBackend
from support.threads import wait_until

OTHER_CALL = CALL.replace("Oslo", "Rome")
# Knows developers: the quoted role is in it.
DEVELOPER_TEMPLATE = TEMPLATE + "{# 'developer' #}"


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    """A client of a model that replies "hello there"."""
    with model_replying("hello there") as model, openai_client(model) as client:
        yield client


def post(client: openai.OpenAI, body: Json) -> httpx.Response:
    return httpx.post(f"{client.base_url}chat/completions", json={"messages": [USER], **body}, timeout=60)


# --- replies


def test_a_reply_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="any", messages=[USER])
    assert reply.choices[0].message.content == "hello there"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len("hello there")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_cached_tokens_and_timings_describe_a_repeated_prompt(client: openai.OpenAI) -> None:
    client.chat.completions.create(model="any", messages=[USER])
    raw = client.chat.completions.with_raw_response.create(model="any", messages=[USER])
    values = json.loads(raw.text)
    details = values["usage"]["prompt_tokens_details"]
    assert 0 < details["cached_tokens"] < values["usage"]["prompt_tokens"]
    assert "cached_tier" in details
    assert values["timings"]["cache_n"] == details["cached_tokens"]
    assert values["timings"]["predicted_n"] == values["usage"]["completion_tokens"]


def test_several_choices_share_one_computed_prompt() -> None:
    with model_replying("hello") as model, openai_client(model) as client:
        long: Json = {"role": "user", "content": "x" * 300}
        reply = client.chat.completions.create(model="any", messages=[long], n=3, seed=7)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert [choice.message.content for choice in reply.choices] == ["hello"] * 3
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 3 * len("hello")
        assert reply.usage.prompt_tokens <= model.metrics.prefilled_tokens < 2 * reply.usage.prompt_tokens


def test_limits_larger_than_the_context_are_not_refused(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 10**9}, {"max_completion_tokens": 10**9}, {"max_tokens": -1}):
        assert post(client, dict(limit)).json()["choices"][0]["finish_reason"] == "stop"


def test_a_limit_ends_a_reply(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = post(client, {name: 3}).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("hel", "length")


def test_stop_texts_end_a_reply(client: openai.OpenAI) -> None:
    for stop in (" there", [" there", "never"]):
        reply = client.chat.completions.create(model="any", messages=[USER], stop=stop)
        assert reply.choices[0].message.content == "hello"


def test_biases_change_which_tokens_are_sampled(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="any", messages=[USER], logit_bias={str(ord("h")): -100, str(ord("Z")): 100}, max_tokens=2
    )
    assert reply.choices[0].message.content == "ZZ"


def test_logprobs_cover_the_reply(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="any", messages=[USER], logprobs=True, top_logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(each.token for each in logprobs.content) == "hello there"
    assert [bytes(each.bytes or []) for each in logprobs.content] == [b.to_bytes() for b in b"hello there"]
    assert all(len(each.top_logprobs) == 2 for each in logprobs.content)
    assert all(math.isclose(each.logprob, 0.0, abs_tol=1e-3) for each in logprobs.content)


def test_thinking_is_reasoning_content() -> None:
    with model_replying("<think>hm</think>hello") as model, openai_client(model) as client:
        message = client.chat.completions.create(model="any", messages=[USER]).choices[0].message
        assert message.content == "hello"
        assert message.reasoning_content == "hm"  # type: ignore[attr-defined]


# --- messages


def prompts_of(monkeypatch: pytest.MonkeyPatch, *bodies: Json, template: str = TEMPLATE) -> list[str]:
    """Return the prompts that the server makes of bodies, with its special tokens spelled out."""
    prompts = record_prompts(monkeypatch)
    with model_replying("x", template=template) as model, openai_client(model) as client:
        for body in bodies:
            assert (answer := post(client, body)).status_code == 200, answer.text
        return [model.detokenize(prompt, special=True) for prompt in prompts]


def test_content_may_be_null_absent_text_or_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    contents: list[Json] = [{"content": None}, {}, {"content": ""}, {"content": "a\nb"}, {"content": parts}]
    bodies: list[Json] = [{"messages": [{"role": "user", **content}]} for content in contents]
    null, absent, empty, text, of_parts = prompts_of(monkeypatch, *bodies)
    assert null == absent == empty
    assert text == of_parts
    assert "<|user|>a\nb<|end|>" in text


def test_parts_of_a_reply_have_no_line_end_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (prompt,) = prompts_of(monkeypatch, {"messages": [USER, {"role": "assistant", "content": parts}, USER]})
    assert "ab<|end|>" in prompt


def test_reasoning_is_accepted_under_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[Json] = [
        {
            "messages": [USER, {"role": "assistant", "content": "yes", name: "hm"}, USER],
            "chat_template_kwargs": {"keep_thinking": True},
        }
        for name in ("reasoning_content", "reasoning")
    ]
    first, second = prompts_of(monkeypatch, *bodies)
    assert first == second
    assert "<think>hm</think>yes" in first


def test_a_developer_is_the_system_unless_the_template_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    body: Json = {"messages": [{"role": "developer", "content": "be brief"}, USER]}
    (unknown,) = prompts_of(monkeypatch, body)
    monkeypatch.undo()
    (known,) = prompts_of(monkeypatch, body, template=DEVELOPER_TEMPLATE)
    assert "<|system|>be brief" in unknown
    assert "<|developer|>be brief" in known


def test_a_system_message_inside_a_conversation_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [USER, {"role": "assistant", "content": "ok"}, {"role": "system", "content": "now rhyme"}, USER]
    (prompt,) = prompts_of(monkeypatch, {"messages": messages})
    assert prompt.index("<|user|>hi") < prompt.index("ok") < prompt.index("<|system|>now rhyme")


def test_content_does_not_inject_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = record_prompts(monkeypatch)
    with model_replying("x") as model, openai_client(model) as client:
        post(client, {"messages": [{"role": "user", "content": SPECIAL[0]}]})
        assert VOCABULARY.special[SPECIAL[0]] not in prompts[0]
        assert SPECIAL[0] in model.detokenize(prompts[0])


# --- tools


def test_parallel_calls_have_ids_of_their_own() -> None:
    with model_replying(CALL + OTHER_CALL, "fine") as model, openai_client(model) as client:
        reply = client.chat.completions.create(model="any", messages=[USER], tools=TOOLS)
        choice = reply.choices[0]
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Oslo"}, {"city": "Rome"}]
        assert len({call.id for call in calls} - {""}) == 2
        results = [{"role": "tool", "tool_call_id": call.id, "content": "12:00"} for call in calls]
        messages = [USER, choice.message.model_dump(exclude_none=True), *results]
        second = client.chat.completions.create(model="any", messages=messages, tools=TOOLS)
        assert second.choices[0].message.content == "fine"
        assert reply.usage is not None
        assert second.usage is not None
        assert second.usage.prompt_tokens_details is not None
        assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= reply.usage.prompt_tokens


def test_the_choice_of_tools_is_followed() -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    with model_replying(CALL) as model, openai_client(model) as client:
        for choice, reason in (
            ("none", "stop"),
            ("auto", "tool_calls"),
            ("required", "tool_calls"),
            (named, "tool_calls"),
        ):
            reply = client.chat.completions.create(model="any", messages=[USER], tools=TOOLS, tool_choice=choice)
            assert reply.choices[0].finish_reason == reason, choice


def test_parallel_calls_can_be_turned_off() -> None:
    with model_replying(CALL + OTHER_CALL) as model, openai_client(model) as client:
        reply = client.chat.completions.create(
            model="any", messages=[USER], tools=TOOLS, parallel_tool_calls=False, max_tokens=200
        )
        assert len(reply.choices[0].message.tool_calls or []) == 1


def test_functions_the_older_form_of_tools_work() -> None:
    function = TOOLS[0]["function"]
    with model_replying(CALL) as model, openai_client(model) as client:
        reply = client.chat.completions.create(model="any", messages=[USER], functions=[function])
        called = reply.choices[0].message.function_call
        assert called is not None
        assert json.loads(called.arguments) == {"city": "Oslo"}
        assert reply.choices[0].finish_reason == "function_call"


# --- formats


class City(pydantic.BaseModel):
    """A reply that the client parses."""

    city: str


def test_the_client_parses_replies_of_a_schema() -> None:
    with model_replying('{"city":"Oslo"}') as model, openai_client(model) as client:
        reply = client.chat.completions.parse(model="any", messages=[USER], response_format=City)
        assert reply.choices[0].message.parsed == City(city="Oslo")


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 7}}}},
        {"response_format": {"type": "json_object", "schema": {"const": 7}}},
        {"json_schema": {"const": 7}},
        {"grammar": 'root ::= "7"'},
    ],
)
def test_formats_constrain_a_reply(client: openai.OpenAI, body: Json) -> None:
    assert post(client, body).json()["choices"][0]["message"]["content"] == "7"


def test_a_json_object_is_an_object(client: openai.OpenAI) -> None:
    thinks_first = {str(ord("<")): -100}  # the template has a mark of thinking, which may come before the reply
    body: Json = {"response_format": {"type": "json_object"}, "max_tokens": 1, "logit_bias": thinks_first}
    assert post(client, body).json()["choices"][0]["message"]["content"] == "{"


def test_the_format_text_changes_nothing(client: openai.OpenAI) -> None:
    reply = post(client, {"response_format": {"type": "text"}}).json()
    assert reply["choices"][0]["message"]["content"] == "hello there"


# --- errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
         "messages[0].tool_calls[0].function.name"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": [[1]]}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "schema": 123}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "7"'}, "grammar"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
    ],
)  # fmt: skip
def test_an_error_names_the_field(client: openai.OpenAI, body: Json, param: str) -> None:
    answer = post(client, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_missing_field_is_named(client: openai.OpenAI) -> None:
    answer = httpx.post(f"{client.base_url}chat/completions", json={"model": "any"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_unknown_fields_and_nulls_are_accepted(client: openai.OpenAI) -> None:
    nulls = dict.fromkeys(name for name in ChatBody.__struct_fields__ if name != "messages")
    assert post(client, {**nulls, "store": True, "brand_new": {"a": [1]}}).status_code == 200
    message: Json = {**USER, "brand_new": 1, "tool_calls": None, "name": None, "reasoning_content": None}
    assert post(client, {"messages": [message]}).status_code == 200


def test_a_prompt_that_is_too_long_has_both_numbers() -> None:
    with model_replying("x") as model, openai_client(model) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(
                model="any", messages=[{"role": "user", "content": "x" * (model.n_ctx + 1)}]
            )
        assert raised.value.code == "context_length_exceeded"
        assert isinstance(raised.value.body, dict)
        assert raised.value.body["n_ctx"] == model.n_ctx < raised.value.body["n_prompt_tokens"]


def test_one_of_several_models_answers_under_its_name() -> None:
    with model_replying("one") as one, model_replying("two") as two, openai_client(one, two) as client:
        for model, text in ((one, "one"), (two, "two")):
            reply = client.chat.completions.create(model=model.id, messages=[USER])
            assert (reply.model, reply.choices[0].message.content) == (model.id, text)
        with pytest.raises(openai.NotFoundError) as raised:
            client.chat.completions.create(model="three", messages=[USER])
        assert raised.value.code == "model_not_found"


# --- the cache and sessions


def test_a_salt_separates_cached_prompts(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        return int(post(client, {"cache_salt": salt}).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("a") == 0
    assert cached("a") > 0
    assert cached("b") == 0


def test_llama_servers_sampling_fields_are_used(client: openai.OpenAI) -> None:
    for field, wrong in (("min_p", 7.0), ("top_p", 7.0), ("repeat_penalty", -1.0), ("frequency_penalty", 1e9)):
        assert post(client, {field: 1}).status_code == 200, field
        assert post(client, {field: wrong}).status_code == 400, field


class Blocking:
    """A model whose first reply waits, once it has begun, until `release` is set."""

    def __init__(self) -> None:
        self.began, self.release = Event(), Event()
        backend = ScriptedBackend(VOCABULARY, self._next, chat_templates={"default": TEMPLATE})
        self.model = erllama.load_backend(backend, cache=erllama.Cache())

    def _next(self, tokens: list[int]) -> int:
        self.began.set()
        assert self.release.wait(60)
        return 256 if tokens[-1] == ord("y") else ord("y")


def test_concurrent_requests_with_one_cache_key_succeed() -> None:
    blocking = Blocking()
    with (
        blocking.model as model,
        running_server(model) as server,
        client_of(server) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        key: Json = {"prompt_cache_key": "k"}
        asked = [pool.submit(post, client, key)]
        assert blocking.began.wait(60)
        asked += [pool.submit(post, client, key), pool.submit(post, client, {**key, "n": 2})]
        wait_until(lambda: model.pending + model.queue_depth == 4)
        blocking.release.set()
        assert [each.result(60).status_code for each in asked] == [200, 200, 200]


def test_a_session_that_is_named_takes_one_request_at_a_time() -> None:
    blocking = Blocking()
    with (
        blocking.model as model,
        running_server(model) as server,
        client_of(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(post, client, {"session_id": "s"})
        assert blocking.began.wait(60)
        second = post(client, {"session_id": "s"})
        blocking.release.set()
        assert first.result(60).status_code == 200
        assert (second.status_code, second.json()["error"]["code"]) == (409, "session_busy")
        assert post(client, {"session_id": "s", "n": 2}).status_code == 200


def test_a_cache_key_is_a_session_of_the_engine() -> None:
    with model_replying("hello") as model, openai_client(model) as client:
        post(client, {"prompt_cache_key": "k"})
        assert model.end_session("prompt_cache_key k")
        assert not model.end_session("prompt_cache_key k")
