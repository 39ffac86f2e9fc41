"""Chats: rendering a conversation, splitting a reply into its parts, and reusing earlier turns."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import erllama
from erllama.chat.conversation import Conversation
from erllama.chat.templates.template import ChatTemplate
from erllama.engine.backends.stub import StubBackend
from erllama.testing.models import BOS, write_llama
from erllama.testing.scripted import END, write_scripted
from support.chat.scripted_model import CALL, TEMPLATE, TOOLS, Message, model_replying, user
from support.examples import examples
from support.paths import SHARED

SAVE_ALL = {"min_tokens": 1, "cold_min_tokens": 1}


# --- turns start where the last one ended -------------------------------------------------------------


def n_new(model: erllama.Model, text: str) -> int:
    return len(model.tokenize(text, add_special=False, parse_special=True))


def test_each_of_twenty_turns_computes_only_its_new_tokens() -> None:
    with model_replying("hello there") as model:
        messages: list[Message] = []
        before: list[int] = []
        for turn in range(20):
            messages.append(user(f"question {turn}: hello?"))
            reply = model.chat(messages)
            assert reply.text == "hello there"
            assert len(reply.tokens) == len("hello there"), (
                "the sampled byte tokens differ from the tokens of the text"
            )
            if turn:
                new = n_new(model, f"<|end|><|user|>question {turn}: hello?<|end|><|assistant|>\t")
                assert reply.timings.prefill_tokens <= new
                assert reply.usage.prompt - reply.usage.cached <= new
                assert list(reply.context_tokens[: len(before)]) == before
            before = list(reply.context_tokens)
            messages.append({"role": "assistant", "content": reply.text})


def test_turns_continue_after_a_restart(tmp_path: Path) -> None:
    messages = [user("hello?")]
    with erllama.Cache(disk=tmp_path) as cache, model_replying("hello there", cache=cache) as model:
        first = model.chat(messages)
    messages += [first.message, user("and?")]
    with erllama.Cache(disk=tmp_path) as cache, model_replying("hello there", cache=cache) as model:
        again = model.chat(messages)
        assert again.context_tokens[: len(first.context_tokens)] == first.context_tokens
        assert again.usage.cached == len(first.context_tokens)
        assert again.cache.tier == "disk"


def test_a_stop_string_is_not_part_of_the_next_prompt() -> None:
    with model_replying("hello thereEND more") as model:
        first = model.chat([user("hello?")], stop="END")
        assert (first.text, first.stop_sequence) == ("hello there", "END")
        again = model.chat([user("hello?"), first.message, user("and?")])
        n = first.usage.prompt + len("hello there")
        assert again.context_tokens[:n] == first.context_tokens[:n]
        assert again.usage.cached >= n
        assert "END" not in model.detokenize(again.context_tokens[: again.usage.prompt])


def test_turns_of_another_tenant_are_not_found() -> None:
    with model_replying("hello there") as model:
        first = model.chat([user("hello?")], cache_salt="one")
        messages = [user("hello?"), first.message, user("and?")]
        by_text = model.chat(messages, cache_salt="two")
        assert by_text.cache.tokens == 0
        assert by_text.context_tokens[: len(first.context_tokens)] != first.context_tokens
        assert by_text.tokens == model.chat(messages, cache_salt="two").tokens


def test_reproducible_chats_tokenize_the_text_alone() -> None:
    with model_replying("hello there") as model:
        first = model.chat([user("hello?")])
        messages = [user("hello?"), first.message, user("and?")]
        text = model.render_chat(messages)
        reply = model.chat(messages, reproducible=True)
        prompt = list(reply.context_tokens[: reply.usage.prompt])
        assert prompt == model.tokenize(text, add_special=False, parse_special=True).tolist()


def test_a_tool_call_is_replayed_as_it_was_sampled() -> None:
    with model_replying(f"Let me see. {CALL}", "It is noon.") as model:
        messages = [user("Time in Oslo?")]
        first = model.chat(messages, tools=TOOLS)
        assert (first.finish_reason, first.text) == ("tool_calls", "Let me see.")
        (call,) = first.tool_calls
        assert (call.name, call.arguments) == ("get_time", {"city": "Oslo"})
        messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "12:00"}]
        assert CALL not in model.render_chat(messages, tools=TOOLS), "the template renders it differently"
        second = model.chat(json.loads(json.dumps(messages)), tools=TOOLS)
        assert second.text == "It is noon."
        assert second.context_tokens[: len(first.context_tokens)] == first.context_tokens
        assert second.timings.prefill_tokens <= n_new(model, "<|end|><|tool|>12:00<|end|><|assistant|>\t")


def test_dropped_thinking_ends_the_shared_prefix_where_it_began() -> None:
    with model_replying("<think>hm</think>hello there") as model:
        first = model.chat([user("hello?")])
        assert (first.thinking, first.text) == ("hm", "hello there")
        assert first.message["reasoning_content"] == "hm"
        messages = [user("hello?"), first.message, user("and?")]
        left_out = model.chat(messages)
        assert left_out.usage.cached == first.usage.prompt
        kept = model.chat(messages, template_args={"keep_thinking": True})
        assert kept.context_tokens[: len(first.context_tokens)] == first.context_tokens
        assert kept.usage.cached >= len(first.context_tokens)


@pytest.mark.parametrize("stop", [None, "there"])
def test_a_continued_text_reuses_the_tokens_of_its_parent(stop: str | None) -> None:
    with model_replying("hello there") as model:
        prompt = "Q<|assistant|>\t"
        first = model.complete(prompt, stop=stop or ())
        assert first.finish_key is not None
        text = f"{prompt}{first.text} and<|assistant|>\t"
        second = model.complete(text, parent_key=first.finish_key)
        output = model.tokenize(prompt, parse_special=True).tolist() + list(first.text.encode())
        assert list(second.context_tokens[: len(output)]) == output
        assert second.cache.tokens >= len(output)
        plain = model.complete(text)
        assert list(plain.context_tokens[: len(output)]) != output, "without the key, only the text counts"
        elsewhere = model.complete("Another text<|assistant|>\t", parent_key=first.finish_key)
        assert elsewhere.context_tokens == model.complete("Another text<|assistant|>\t").context_tokens


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Think, call a tool, and answer after a result, in tokens that differ from those of the text."""
    call = '{"name": "get_time", "arguments": {"city": "Oslo"}}'
    thought, pieces, answer = "hm", ['{"name": ', '"get_time", "arguments": ', '{"city": "Oslo"}}'], "It's done"
    assert "".join(pieces) == call
    chain = ["<|assistant|>", "<think>", *thought, "</think>", "<tool_call>", *pieces, "</tool_call>", END]
    follows = dict(pairwise(chain))
    output = ["<|answer|>", *answer, END]
    follows |= dict(pairwise(output))
    template = (
        "{%- if tools %}<|system|>{{ tools | tojson }}{{ eos_token }}{% endif %}"
        "{%- for m in messages %}"
        "{%- set begin = '<|answer|>' if loop.previtem and loop.previtem.role == 'tool' else '<|assistant|>' %}"
        "{%- if m.role == 'assistant' %}{{ begin }}"
        "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        "{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
        "{%- else %}<|user|>{{ m.content }}{% endif %}"
        "{{- eos_token }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|answer|>' if messages[-1].role == 'tool' else '<|assistant|>' }}"
        "{%- endif %}"
    )
    special = [f"<|{name}|>" for name in ("system", "user", "assistant", "answer")]
    special += ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    path = tmp_path_factory.mktemp("scripted") / "scripted.gguf"
    return write_scripted(path, follows, words=[*pieces, "done", "hm"], special=special, chat_template=template)


def test_a_model_thinks_calls_a_tool_and_answers(scripted: Path) -> None:
    with erllama.load_model(
        scripted, cache=erllama.Cache(), policy={"min_tokens": 1, "cold_min_tokens": 1}, n_threads=1
    ) as model:
        messages = [user("Time in Oslo?")]
        for turn in range(10):
            stream = model.stream_chat(messages, tools=TOOLS, temperature=0.0)
            kinds = [type(event) for event in stream]
            first = stream.result()
            order = [kind for i, kind in enumerate(kinds) if i == 0 or kind is not kinds[i - 1]]
            assert order == [
                erllama.ThinkingDelta, erllama.ThinkingEnd, erllama.ToolCallDelta, erllama.ToolCallEnd, erllama.Done
            ]  # fmt: skip
            assert (first.thinking, first.text, first.finish_reason) == ("hm", "", "tool_calls")
            assert first.tool_calls[0].arguments == {"city": "Oslo"}
            assert (
                list(first.tokens)
                != model.tokenize(
                    model.detokenize(first.tokens, special=True), add_special=False, parse_special=True
                ).tolist()
            )
            messages += [first.message, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "noon"}]
            second = model.chat(messages, tools=TOOLS, temperature=0.0)
            assert second.text == "It's done"
            assert second.context_tokens[: len(first.context_tokens)] == first.context_tokens
            assert second.timings.prefill_tokens <= n_new(model, "</s><|user|>noon</s><|answer|>")
            messages += [second.message, user("And now?")]
            if turn:
                assert first.timings.prefill_tokens <= n_new(model, "</s><|user|>And now?</s><|assistant|>")


@pytest.mark.parametrize("choice", ["auto", "required", "get_time"])
def test_grammars_accept_markers_that_are_special_tokens(scripted: Path, choice: str) -> None:
    with erllama.load_model(scripted, cache=erllama.Cache(), n_threads=1) as model:
        reply = model.chat([user("Q")], tools=TOOLS, tool_choice=choice, temperature=0.0, max_tokens=100)
        assert [call.arguments for call in reply.tool_calls] == [{"city": "Oslo"}]
        assert reply.raw_tool_calls[0].startswith(b"<tool_call>")
        assert reply.raw_tool_calls[0].endswith(b"</tool_call>")


# --- the parts of a reply ------------------------------------------------------------------------------


def test_streams_and_asyncio_return_the_same_reply_as_chat() -> None:
    output = f"<think>hm</think>Well. {CALL}"
    options = {"tools": TOOLS, "thinking_signing_key": b"k", "seed": 1}
    with model_replying(output) as model:
        whole = model.chat([user("Q")], **options)
        stream = model.stream_chat([user("Q")], **options)
        events = list(stream)

        async def streamed() -> tuple[list[erllama.Event], erllama.ChatCompletion, erllama.ChatCompletion]:
            stream = model.astream_chat([user("Q")], **options)
            events = [event async for event in stream]
            return events, await stream.result(), await model.achat([user("Q")], **options)

        async_events, async_result, async_whole = asyncio.run(streamed())
        for result in (
            stream.result(),
            events[-1].completion,
            async_result,
            async_whole,
            async_events[-1].completion,
        ):
            assert (result.text, result.thinking, result.tokens) == (whole.text, whole.thinking, whole.tokens)
            assert result.thinking_signature == whole.thinking_signature != b""
            assert [(call.name, call.arguments) for call in result.tool_calls] == [("get_time", {"city": "Oslo"})]
        ends = [event for event in events if isinstance(event, erllama.ToolCallEnd)]
        assert [end.full for end in ends] == [CALL.encode()]
        assert ends[0].calls[0].name == "get_time"


def test_one_reply_can_hold_several_calls() -> None:
    with model_replying(f"{CALL}\n{CALL.replace('Oslo', 'Rome')}") as model:
        reply = model.chat([user("Q")], tools=TOOLS)
        assert [call.arguments["city"] for call in reply.tool_calls] == ["Oslo", "Rome"]
        assert len({call.id for call in reply.tool_calls}) == 2
        assert len(reply.message["tool_calls"]) == 2
        one = model.chat([user("Q")], tools=TOOLS, parallel_tool_calls=False)
        assert len(one.tool_calls) == 1


def test_a_malformed_call_is_returned_as_text_with_its_error() -> None:
    bad = "<tool_call>{nonsense}</tool_call>"
    with model_replying(f"Hm. {bad}") as model:
        markers = ("<tool_call>", "</tool_call>")
        reply = model.chat(
            [user("Q")], tools=TOOLS, tool_markers=markers
        )  # with these, no grammar constrains the call
        assert reply.text == f"Hm.{bad}"
        assert (reply.finish_reason, reply.tool_calls) == ("stop", ())
        assert len(reply.tool_call_errors) == 1
        events = list(model.stream_chat([user("Q")], tools=TOOLS, tool_markers=markers))
        (end,) = [event for event in events if isinstance(event, erllama.ToolCallEnd)]
        assert (end.full, end.calls) == (bad.encode(), ())
        assert end.error == reply.tool_call_errors[0]


def test_the_schema_is_enforced_from_the_call_marker_on() -> None:
    with model_replying('<tool_call>{"name":"get_tide","arguments":{"town":1}}</tool_call>') as model:
        reply = model.chat([user("Q")], tools=TOOLS, seed=2, max_tokens=200)
        assert not reply.tool_call_errors
        assert reply.tool_calls[0].name == "get_time"


def random_model() -> erllama.Model:
    backend = StubBackend(seed=3)
    backend.chat_templates = {"default": TEMPLATE}  # type: ignore[attr-defined]
    return erllama.load_backend(backend, cache=erllama.Cache())


CLOSED = {"additionalProperties": False}
schemas = st.fixed_dictionaries(
    {
        "n": st.sampled_from([{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"}]),
        "word": st.sampled_from([{"type": "string", "maxLength": 5}, {"enum": ["a", "b c", '"']}]),
        "list": st.just({"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 3}),
    }
).map(lambda properties: {"type": "object", "properties": properties, "required": [*properties], **CLOSED})


@settings(max_examples=examples(20), deadline=None)
@given(st.lists(schemas, min_size=1, max_size=3), st.integers(0, 1000), st.booleans(), st.data())
def test_a_required_call_is_made_and_valid(
    parameters: list[dict[str, object]], seed: int, parallel: bool, data: st.DataObject
) -> None:
    tools = [{"name": f"tool{i}", "input_schema": schema} for i, schema in enumerate(parameters)]
    choice = data.draw(st.sampled_from(["required", *(tool["name"] for tool in tools)]))
    format = data.draw(st.sampled_from(["hermes", "llama3", "mistral", "deepseek-v3.1", "json"]))
    with random_model() as model:
        reply = model.chat(
            [user("Q")],
            tools=tools,
            tool_choice=choice,
            tool_format=format,
            parallel_tool_calls=parallel,
            temperature=1.5,
            seed=seed,
            max_tokens=1500,
        )
    if reply.finish_reason == "length":
        return
    assert not reply.tool_call_errors
    assert reply.tool_calls
    assert parallel or len(reply.tool_calls) == 1
    for call in reply.tool_calls:
        assert choice in ("required", call.name)
        jsonschema.validate(call.arguments, parameters[int(call.name[4:])])


def test_tool_choice_none_disables_calls() -> None:
    with model_replying(CALL) as model:
        reply = model.chat([user("Q")], tools=TOOLS, tool_choice="none")
        assert (reply.text, reply.tool_calls, reply.finish_reason) == (CALL, (), "stop")
        assert "get_time" in model.detokenize(reply.context_tokens[: reply.usage.prompt])


def test_call_syntax_is_greedy_and_call_payload_is_sampled() -> None:
    arguments = set()
    with model_replying("<tool_call>") as model:  # then anything that its grammar allows
        for seed in range(8):
            reply = model.chat([user("Q")], tools=TOOLS, seed=seed, temperature=5.0, max_tokens=300)
            arguments.add(reply.raw_tool_calls[0])
        starts = {full.split(b'"arguments":')[0] for full in arguments}
    assert len(starts) == 1
    assert len(arguments) > 1


def test_stop_strings_grammars_logprobs_and_cancellation_work_in_chats() -> None:
    with model_replying("<think>END</think>one END two") as model:
        stopped = model.chat([user("Q")], stop="END")
        assert (stopped.thinking, stopped.text, stopped.stop_sequence) == ("END", "one ", "END")
        listed = model.chat([user("Q")], json_schema={"type": "integer", "maximum": 9, "minimum": 0})
        assert listed.text in "0123456789"
        probabilities = model.chat([user("Q")], logprobs=2)
        assert [entry.token for entry in probabilities.logprobs] == list(probabilities.tokens)
    with model_replying("hello there " * 300) as model:
        stream = model.stream_chat([user("Q")])
        next(stream)
        stream.cancel()
        assert stream.result().finish_reason == "cancelled"


def test_thinking_can_be_disabled_and_has_a_budget() -> None:
    template = TEMPLATE.replace("<|assistant|>\t' }}{% endif %}", "<|assistant|><think>\t' }}{% endif %}")
    with model_replying("so hm</think>hello there", template=template) as model:
        free = model.chat([user("Q")])
        assert (free.thinking, free.text) == ("so hm", "hello there")
        cut = model.chat([user("Q")], thinking=True, thinking_budget_tokens=2, thinking_budget_message=" enough.")
        assert cut.thinking == "so enough."
        events = list(model.stream_chat([user("Q")], thinking="disabled", max_tokens=30))
        assert not any(isinstance(event, erllama.ThinkingDelta | erllama.ThinkingEnd) for event in events)
        done = events[-1].completion
        prompt = done.usage.prompt
        assert model.detokenize(done.context_tokens[prompt:]).startswith("</think>")


def test_a_template_receives_the_thinking_option() -> None:
    template = TEMPLATE + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    with model_replying("x", template=template) as model:
        assert model.render_chat([user("Q")], thinking="disabled").endswith("False")
        assert model.render_chat([user("Q")], thinking=True).endswith("True")
        assert model.render_chat([user("Q")]).endswith("\t")


def test_the_last_message_can_be_continued() -> None:
    with model_replying("hello there") as model:
        messages = [user("Q"), {"role": "assistant", "content": "hello"}]
        reply = model.chat(messages, continue_final_message=True)
        text = model.detokenize(reply.context_tokens[: reply.usage.prompt], special=True)
        assert text.endswith("<|assistant|>\thello")
        assert reply.text == " there"
        assert reply.message == {"role": "assistant", "content": "hello there"}, "it replaces the last one"
        again = model.chat([user("Q"), reply.message, user("and?")])
        assert again.context_tokens[: len(reply.context_tokens)] == reply.context_tokens


TRIMMING = TEMPLATE.replace("{{- m.content }}", "{{- m.content | trim }}")


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING], ids=["keeping", "trimming"])
@pytest.mark.parametrize("content", ["hello ", "hello\n\n", " hello", "hello", " hello \n", " ", "\n", ""])
def test_a_continued_message_has_the_tokens_that_were_computed(content: str, template: str) -> None:
    computed = content.strip() if template is TRIMMING else content
    with model_replying(computed + "there", template=template) as model:
        begun: Message = {"role": "assistant", "content": content}
        reply = model.chat([user("Q"), begun], continue_final_message=True)
        prompt = model.detokenize(reply.context_tokens[: reply.usage.prompt], special=True)
        assert prompt == f"<|user|>Q<|end|><|assistant|>\t{computed}"
        assert reply.message == {"role": "assistant", "content": computed + "there"}
        again = model.chat([user("Q"), reply.message, user("and?")])
        assert again.context_tokens[: len(reply.context_tokens)] == reply.context_tokens
        assert again.usage.cached >= len(reply.context_tokens) - 1


@pytest.mark.parametrize("path", sorted((SHARED / "templates").glob("*.jinja")), ids=lambda path: path.stem)
@pytest.mark.parametrize("content", ["Once upon a time ", "Once\n\n", "\n Once \n"])
def test_real_templates_continue_the_last_message(path: Path, content: str) -> None:
    messages: list[Message] = [user("Tell a story."), {"role": "assistant", "content": content}]
    template = ChatTemplate(path.read_text("utf-8"), bos_token="<s>", eos_token="</s>")
    tools: list[Message] = list(TOOLS) if "tool_use" in path.stem else []  # some of these templates need it
    conversation = Conversation(template, messages, tools, None, {}, True)
    try:
        text = conversation.render()
    except erllama.TemplateError as refusal:
        assert "cannot be continued" in str(refusal)  # noqa: PT017
        return
    message = conversation.with_stripped_content(text).reply_message("there", "", [])
    assert content.strip() in str(message["content"])
    assert (text + "there").endswith(str(message["content"]))


@pytest.mark.parametrize("n", range(1, 14))
def test_a_reply_cut_within_a_character_continues_from_its_tokens(n: int) -> None:
    output = "hé 🙂! é"
    with model_replying(output) as model:
        first = model.chat([user("Q")], max_tokens=n)
        assert first.tokens == tuple(output.encode()[:n])
        assert first.text == output.encode()[:n].decode("utf-8", "replace")
        messages = [user("Q"), first.message]
        again = model.chat(messages, continue_final_message=True)
        assert again.context_tokens[: len(first.context_tokens)] == first.context_tokens
        assert again.usage.prompt == len(first.context_tokens)
        assert again.message == {"role": "assistant", "content": output}
        assert first.text.removesuffix("\ufffd") + again.text == output
        third = model.chat([user("Q"), again.message, user("and?")])
        assert third.context_tokens[: len(again.context_tokens)] == again.context_tokens


def test_a_reply_can_be_continued_byte_by_byte() -> None:
    with model_replying("🙂é") as model:
        message: Message = model.chat([user("Q")], max_tokens=1).message
        while True:
            reply = model.chat([user("Q"), message], continue_final_message=True, max_tokens=1)
            message = reply.message
            if reply.finish_reason == "stop":
                break
        assert message["content"] == "🙂é"


def test_a_stream_left_within_a_character_continues_from_its_tokens() -> None:
    with model_replying("a🙂b") as model:
        stream = model.stream_chat([user("Q")], max_tokens=3)
        text = "".join(event.text for event in stream if isinstance(event, erllama.TextDelta))
        assert text == "a\ufffd"
        again = model.stream_chat([user("Q"), {"role": "assistant", "content": text}], continue_final_message=True)
        assert "".join(event.text for event in again if isinstance(event, erllama.TextDelta)) == "🙂b"
        assert again.result().message["content"] == "a🙂b"


def test_an_incomplete_character_keeps_its_bytes() -> None:
    with erllama.load_backend(StubBackend(), cache=erllama.Cache()) as model:
        prompt = [*b"a", *"é".encode()[:1]]
        assert model.complete(prompt, max_tokens=2, logit_bias={ord("b"): 1000.0}).text == "\ufffdbb"
        assert model.prefill(prompt).text == ""


@pytest.mark.parametrize("n", range(1, 8))
def test_a_completion_continues_within_a_character(n: int) -> None:
    output = "hé🙂"
    with model_replying(output) as model:
        first = model.complete("<|assistant|>\t", max_tokens=n)
        assert first.text.removesuffix("\ufffd") + model.complete(first.context_tokens).text == output


def test_usage_counts_cached_and_stored_tokens() -> None:
    with model_replying("hello there") as model:
        reply = model.chat([user("Q")])
        assert reply.usage.completion == len(reply.tokens)
        assert reply.usage.prompt + reply.usage.completion == len(reply.context_tokens) == reply.usage.total
        assert reply.cache_delta == erllama.CacheDelta(0, len(reply.context_tokens))
        again = model.chat([user("Q")])
        assert again.cache_delta == erllama.CacheDelta(again.usage.prompt - 1, 0)


def test_a_model_without_a_template_gets_chatml_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with erllama.load_backend(StubBackend(), cache=erllama.Cache()) as model, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert "<|im_start|>user\nQ<|im_end|>" in model.render_chat([user("Q")])
    assert [record.message for record in caplog.records if "ChatML" in record.message]
    assert len([record for record in caplog.records if "ChatML" in record.message]) == 1


def test_templates_are_accepted_as_text_name_or_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("file: {{ messages[0].content }}")
    with model_replying("x") as model:
        model._backend.chat_templates["short"] = "short: {{ messages[0].content }}"  # type: ignore[attr-defined]
        assert model.render_chat([user("Q")], chat_template="text: {{ messages[0].content }}") == "text: Q"
        assert model.render_chat([user("Q")], chat_template="short") == "short: Q"
        assert model.render_chat([user("Q")], chat_template=file) == "file: Q"


def test_tokens_of_a_conversation_can_be_completed_and_prefilled() -> None:
    with model_replying("hello there") as model:
        ids = model.apply_chat_template([{"role": "system", "content": "Be brief."}, user("Q")])
        assert model.detokenize(ids, special=True) == model.render_chat(
            [{"role": "system", "content": "Be brief."}, user("Q")]
        )
        model.prefill(ids)
        assert model.complete(ids).text == "hello there"


def test_bos_appears_once(tmp_path: Path) -> None:
    with erllama.load_model(write_llama(tmp_path / "model.gguf"), cache=erllama.Cache(), n_threads=1) as model:
        plain = "{{ messages[0].content }}"
        for template in (plain, "{{ bos_token }}" + plain):
            ids = model.apply_chat_template([user("Q")], chat_template=template).tolist()
            assert ids == model.tokenize("Q").tolist() == [BOS, ids[1]]


def test_openai_and_anthropic_forms_are_the_same_conversation() -> None:
    openai: Sequence[Message] = [
        user("Q"),
        {"role": "assistant", "content": "A", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]  # fmt: skip
    anthropic: Sequence[Message] = [
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "A"},
            {"type": "tool_use", "id": "c1", "name": "get_time", "input": {"city": "Oslo"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "noon"}]},
    ]  # fmt: skip
    with model_replying("x") as model:
        assert model.render_chat(openai) == model.render_chat(anthropic)


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "options", "error", "match"),
    [
        ([], {}, erllama.ChatError, "message"),
        ([{"role": "oracle", "content": "Q"}], {}, erllama.ChatError, "0"),
        ([user("Q"), {"role": "user"}], {}, erllama.ChatError, "1"),
        ([user("Q"), {"role": "tool", "tool_call_id": "c9", "content": "x"}], {}, erllama.ChatError, "1"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            {},
            erllama.ChatError,
            "0",
        ),
        ([user("Q")], {"tools": [{"name": "f", "input_schema": {"type": "objekt"}}]}, erllama.ChatError, "tool"),
        ([user("Q")], {"chat_template": "{% if %}"}, erllama.TemplateError, "line 1"),
        ([user("Q")], {"chat_template": "{{ raise_exception('no') }}"}, erllama.TemplateError, "no"),
        ([user("Q")], {"chat_template": 7}, erllama.OptionError, "chat_template"),
        ([user("Q")], {"chat_template": Path("/nowhere/t.jinja")}, erllama.OptionError, "nowhere"),
        ([user("Q")], {"thinking_budget_tokens": -1}, erllama.OptionError, "-1"),
        ([user("Q")], {"tool_choice": "required"}, erllama.OptionError, "requires"),
        ([user("Q")], {"tools": TOOLS, "tool_choice": "get_tim"}, erllama.OptionError, "get_time"),
        ([user("Q")], {"tools": TOOLS, "tool_format": "hermit"}, erllama.OptionError, "hermes"),
        ([user("Q")], {"tools": TOOLS, "tool_choice": "required", "regex": "a"}, erllama.OptionError, "grammar"),
        ([user("Q")], {"tools": TOOLS, "chat_template": "{{ messages[0].content }}"}, erllama.ChatError, "tools"),
        ([user("Q")], {"continue_final_message": True}, erllama.ChatError, "assistant"),
        ([user("Q")], {"continue_final_message": 1}, erllama.OptionError, "continue_final_message"),
        ([user("Q")], {"parallel_tool_calls": "no", "tools": TOOLS}, erllama.OptionError, "parallel_tool_calls"),
        ([user("Q")], {"template_args": 3}, erllama.OptionError, "template_args"),
        ([user("Q")], {"template_args": {3: 1}}, erllama.OptionError, "template_args has the key 3"),
        ([user("Q")], {"template_args": {"messages": []}}, erllama.OptionError, "template_args has 'messages'"),
        (
            [user("Q")],
            {"template_args": {"x": "\ud800"}, "chat_template": "{{ x }}"},
            erllama.ChatError,
            "surrogate",
        ),
        ([user("Q")], {"stop": "\ud800"}, erllama.OptionError, "surrogate"),
        ([user("Q")], {"chat_template": Path("a\0b")}, erllama.OptionError, "cannot be read"),
        (
            [
                user("Q"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
                    ],
                },
            ],
            {"continue_final_message": True},
            erllama.ChatError,
            "tool calls",
        ),
        ([user("Q")], {"tols": TOOLS}, erllama.OptionError, "did you mean 'tools'"),
        ([user("Q")], {"chat_template": "defualt"}, erllama.OptionError, "'default'"),
        ([user("Q")], {"tool_format": "hermes"}, erllama.OptionError, "tool_format without tools"),
        ([user("Q")], {"tool_markers": ("<a>", "</a>")}, erllama.OptionError, "tool_markers without tools"),
        (
            [user("Q")],
            {"tools": TOOLS, "tool_payload_markers": ("<a>", "</a>")},
            erllama.OptionError,
            "payload_markers without",
        ),
        ([user("Q")], {"thinking_budget_message": "so"}, erllama.OptionError, "without thinking_budget_tokens"),
        ([user("Q")], {"thinking": False, "thinking_budget_tokens": 5}, erllama.OptionError, "disabled"),
    ],
)
def test_bad_conversations_raise_typed_errors(
    messages: list[Message], options: dict[str, object], error: type[erllama.Error], match: str
) -> None:
    with model_replying("x") as model:
        with pytest.raises(error, match=match):
            model.chat(messages, **options)  # type: ignore[arg-type]
        assert model.chat([user("Q")]).text == "x", "the model continues"


def test_tools_are_compiled_only_for_conversations_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        "erllama.chat.tool_calls.tools.find_schema_error", lambda schema: str(compiled.append(schema) or "")
    )

    def tools(n: int) -> list[Message]:
        return [
            {"name": f"f{i}", "parameters": {"properties": {f"fits{i}of{n}": {"type": "string"}}}} for i in range(n)
        ]

    with model_replying("hello") as model:
        with pytest.raises(erllama.PromptTooLong):
            model.chat([user("Q")], tools=tools(300))
        assert compiled == []
        model.chat([user("Q")], tools=tools(2))
        model.chat([user("Q")], tools=tools(2))
        assert len(compiled) == 2


def test_a_chat_refuses_tools_whose_schemas_do_not_compile() -> None:
    unique = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    with model_replying("hello") as model:
        with pytest.raises(erllama.ChatError, match="tool 'f': its parameters do not compile"):
            model.chat([user("Q")], tools=[{"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}}])
        with pytest.raises(erllama.ChatError, match="tool 'f': it is strict"):
            model.chat([user("Q")], tools=[{"name": "f", "strict": True, "parameters": unique}])
