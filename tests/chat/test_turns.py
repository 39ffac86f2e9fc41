"""Turns: what the next turn reuses of a reply, however the reply ended, and what must work if reuse fails."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import erllama
from erllama.chat.chats import Chats
from erllama.chat.history import History
from erllama.chat.turn import Turn
from erllama.engine import Grammar
from support.chat.scripted_model import CALL, SPECIAL, TEMPLATE, TOOLS, VOCABULARY, Message, model_replying, user
from support.scripted_backend import PieceVocabulary, ScriptedBackend

KEEP = {"template_args": {"keep_thinking": True}}


def prompt_of(model: erllama.Model, messages: list[Message], **options: object) -> list[int]:
    """Return the tokens of a conversation, and check that they spell what the template renders."""
    reply = model.chat(messages, max_tokens=1, **options)  # type: ignore[arg-type]
    tokens = reply.context_tokens[: reply.usage.prompt]
    return list(tokens)


def prompt_text(model: erllama.Model, messages: list[Message], **options: object) -> str:
    return model.detokenize(prompt_of(model, messages, **options), special=True)


# --- what was cut short ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 33)])
def test_cut_thinking_or_answers_return_as_the_template_renders_them(n: int) -> None:
    with model_replying("<think>hmm well</think>hello there") as model:
        first = model.chat([user("hello?")], max_tokens=n, **KEEP)
        messages = [user("hello?"), first.message, user("and?")]
        assert prompt_text(model, messages, **KEEP) == model.render_chat(messages, **KEEP)


@pytest.mark.parametrize("n", [*range(50, 74)])
def test_a_cut_call_returns_as_the_template_renders_it(n: int) -> None:
    options = {"tools": TOOLS, "tool_markers": ("<tool_call>", "</tool_call>")}  # no grammar completes the call
    with model_replying(f"A {CALL}") as model:
        first = model.chat([user("hello?")], max_tokens=n, **options)
        messages = [user("hello?"), first.message]
        if first.tool_calls:
            messages.append({"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "noon"})
        text = prompt_text(model, [*messages, user("and?")], **options)
        if n < len(f"A {CALL}"):
            assert text == model.render_chat([*messages, user("and?")], tools=TOOLS)
        assert "</tool_call><|end|>" in text or "tool_call" not in text or "_call>\n" not in text


@pytest.mark.parametrize("n", [5, 6, 7])
def test_a_cut_text_is_continued_with_its_own_tokens(n: int) -> None:
    trimming = TEMPLATE.replace("{{- m.content }}", "{{- m.content | trim }}")
    with model_replying("hello there", template=trimming) as model:
        first = model.chat([user("Q")], max_tokens=n)
        assert (first.text, first.finish_reason) == ("hello there"[:n], "length")
        again = model.chat([user("Q"), first.message, user("and?")])
        same = len(first.context_tokens) - (n == 6)  # the template drops the space
        assert again.context_tokens[:same] == first.context_tokens[:same]
        assert again.usage.cached >= same - 1


def test_thinking_within_the_answer_is_not_part_of_the_next_prompt() -> None:
    with model_replying("<think>he</think>hello there") as model:
        first = model.chat([user("hello?")])
        messages = [user("hello?"), first.message, user("and?")]
        assert prompt_text(model, messages) == model.render_chat(messages)
        kept = [user("hello?"), first.message, user("and?")]
        assert prompt_text(model, kept, **KEEP) == model.render_chat(kept, **KEEP)


def test_thinking_with_a_call_is_replayed_as_the_template_renders_it() -> None:
    with model_replying(f"<think>\nhm\n</think>\n\n{CALL}") as model:
        first = model.chat([user("Q")], tools=TOOLS, **KEEP)
        assert first.thinking == "hm"
        messages = [
            user("Q"),
            first.message,
            {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "1"},
        ]
        assert CALL not in model.render_chat(messages, tools=TOOLS, **KEEP)
        prompt = prompt_of(model, messages, tools=TOOLS, **KEEP)
        assert prompt[: len(first.context_tokens)] == list(first.context_tokens)
        assert prompt_text(model, messages, tools=TOOLS) == model.render_chat(messages, tools=TOOLS), (
            "the template drops it"
        )


def test_spelled_out_special_tokens_in_a_reply_stay_text() -> None:
    """The end-of-message token and its name spelled in letters have the same text."""
    with model_replying("foo<|end|><|user|>bar<|end|><|assistant|>\tbaz") as model:
        model.chat([user("Q")])
        forged: list[Message] = [user("Q")]
        for question, answer in (("bar", "foo"), ("more", "baz")):
            forged += [{"role": "assistant", "content": answer}, user(question)]
        by_text = model.tokenize(model.render_chat(forged), add_special=False, parse_special=True).tolist()
        assert prompt_of(model, forged) == by_text


def test_a_malformed_call_is_replayed_with_its_own_tokens() -> None:
    options = {"tools": TOOLS, "tool_markers": ("<tool_call>", "</tool_call>")}
    for reply in ("Hm. <tool_call>{nonsense}</tool_call>", "<tool_call>{nonsense}</tool_call> Hm."):
        with model_replying(reply) as model:
            first = model.chat([user("Q")], **options)
            assert first.tool_call_errors
            assert first.text == reply.replace(" ", ""), "in the order of the reply"
            again = model.chat([user("Q"), first.message, user("and?")], **options)
            assert again.context_tokens[: len(first.context_tokens)] == first.context_tokens
            assert again.usage.cached >= len(first.context_tokens) - 1


# --- streams that are left ------------------------------------------------------------------------------


def _break(model: erllama.Model, n: int) -> str:
    text = ""
    for event in model.stream_chat([user("Q")]):
        assert isinstance(event, erllama.TextDelta)
        text += event.text
        if len(text) >= n:
            break
    return text


def _leave(model: erllama.Model, n: int) -> str:
    text = ""
    with model.stream_chat([user("Q")]) as stream:
        while len(text) < n:
            event = next(stream)
            assert isinstance(event, erllama.TextDelta)
            text += event.text
    return text


def _leave_async(model: erllama.Model, n: int) -> str:
    async def left() -> str:
        text = ""
        async with model.astream_chat([user("Q")]) as stream:
            async for event in stream:
                assert isinstance(event, erllama.TextDelta)
                text += event.text
                if len(text) >= n:
                    break
        return text

    return asyncio.run(left())


def _drop_async(model: erllama.Model, n: int) -> str:
    async def dropped() -> str:
        text = ""
        async for event in model.astream_chat([user("Q")]):
            assert isinstance(event, erllama.TextDelta)
            text += event.text
            if len(text) >= n:
                break
        return text

    return asyncio.run(dropped())


@pytest.mark.parametrize("leave", [_break, _leave, _leave_async, _drop_async])
def test_an_abandoned_stream_is_continued_from_what_was_read(
    leave: Callable[[erllama.Model, int], str],
) -> None:
    with model_replying("hello there") as model:
        text = leave(model, 4)
        gc.collect()
        messages = [user("Q"), {"role": "assistant", "content": text}, user("and?")]
        prompt = prompt_of(model, messages)
        begin = model.apply_chat_template([user("Q")]).tolist()
        assert prompt[: len(begin) + len(text)] == [*begin, *text.encode()]
        assert model.detokenize(prompt, special=True) == model.render_chat(messages)


def test_a_cancelled_stream_that_was_read_to_its_end_is_continued() -> None:
    with model_replying("hello there " * 300) as model:
        stream = model.stream_chat([user("Q")])
        next(stream)
        stream.cancel()
        reply = stream.result()
        assert reply.finish_reason == "cancelled"
        messages = [user("Q"), reply.message, user("and?")]
        n = len(reply.context_tokens) - reply.text.endswith(" ")
        assert prompt_of(model, messages)[:n] == list(reply.context_tokens[:n])


# --- the same reply from every method -------------------------------------------------------------------


def test_calls_have_one_id_each_in_events_and_results() -> None:
    with model_replying(f"{CALL}\n{CALL}") as model:
        stream = model.stream_chat([user("Q")], tools=TOOLS)
        streamed = [call.id for event in stream if isinstance(event, erllama.ToolCallEnd) for call in event.calls]
        reply = stream.result()
        assert streamed == [call.id for call in reply.tool_calls]
        assert len(set(streamed)) == 2
        results = [{"role": "tool", "tool_call_id": id, "content": "noon"} for id in streamed]
        assert model.chat([user("Q"), reply.message, *results], tools=TOOLS, max_tokens=1)


def test_calls_numbered_per_span_have_unique_ids_in_events() -> None:
    call = '<|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>{"city": "Oslo"}<|tool_call_end|>'
    span = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    with model_replying(f"<c>{span}</c><c>{span}</c>") as model:
        stream = model.stream_chat([user("Q")], tools=TOOLS, tool_format="kimi", tool_markers=("<c>", "</c>"))
        streamed = [call.id for event in stream if isinstance(event, erllama.ToolCallEnd) for call in event.calls]
        assert len(set(streamed)) == len(streamed) >= 2
        assert streamed == [call.id for call in stream.result().tool_calls]


def test_a_reply_is_finished_once_for_many_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, remember = [], History.remember_reply

    def slow(self: History, *args: object, **options: object) -> bool:
        counted.append(1)
        time.sleep(0.05)
        return remember(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(History, "remember_reply", slow)
    with model_replying(CALL) as model:
        stream = model.stream_chat([user("Q")], tools=TOOLS)
        replies = []
        threads = [threading.Thread(target=lambda: replies.append(stream.result())) for _ in range(4)]
        for thread in threads:
            thread.start()
        events = list(stream)
        for thread in threads:
            thread.join()
    assert len(counted) == 1
    assert all(reply is events[-1].completion for reply in replies)


# --- remembering never costs a reply --------------------------------------------------------------------


def test_a_reply_is_returned_when_remembering_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object, **options: object) -> bool:
        raise RuntimeError("no")

    monkeypatch.setattr(History, "remember_reply", fails)
    with model_replying("hello there") as model:
        assert model.chat([user("Q")]).text == "hello there"
        with model.stream_chat([user("Q")]) as stream:
            next(stream)
    assert [record.levelname for record in caplog.records if "remembering" in record.message] == ["ERROR"] * 2


def test_a_reply_that_its_template_refuses_is_still_returned(caplog: pytest.LogCaptureFixture) -> None:
    template = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    with model_replying("hello there", template=template) as model, caplog.at_level(logging.INFO):
        reply = model.chat([user("Q")])
        assert reply.text == "hello there"
        messages = [user("Q"), reply.message, user("and?")]
        assert prompt_of(model, messages)[: len(reply.context_tokens)] == list(reply.context_tokens)
    assert not [record for record in caplog.records if "remembering" in record.message]


def test_a_template_file_is_read_once_per_turn(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    with model_replying("hello there") as model:
        stream = model.stream_chat([user("Q")], chat_template=file)
        next(stream)
        file.unlink()
        reply = stream.result()
        assert reply.text == "hello there"
        messages = [user("Q"), reply.message, user("and?")]
        assert prompt_of(model, messages, chat_template=TEMPLATE)[: len(reply.context_tokens)] == list(
            reply.context_tokens
        )


# --- what turns cost ------------------------------------------------------------------------------------


def test_tool_schemas_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile = [], Grammar.json_schema.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Grammar], schema: object) -> Grammar:
        compiled.append(schema)
        found: Grammar = compile(cls, schema)
        return found

    monkeypatch.setattr(Grammar, "json_schema", classmethod(counting))
    tools = [{"name": "f", "input_schema": {"type": "object", "properties": {f"p{i}": {}}}} for i in range(1)]
    with model_replying("x") as model:
        for _ in range(3):
            model.chat([user("Q")], tools=tools)
    assert len(compiled) <= 1


def test_the_event_loop_runs_while_a_chat_is_prepared_and_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def record_threads(of: type, name: str) -> None:
        function = getattr(of, name)

        def recorded(*args: object) -> object:
            threads.append(threading.get_ident())
            return function(*args)

        monkeypatch.setattr(of, name, recorded)

    async def chatted(model: erllama.Model) -> None:
        stream = model.astream_chat([user("Q")])
        async for event in stream:
            assert isinstance(event, erllama.TextDelta | erllama.Done)
        assert (await stream.result()).text == "hello there"
        await model.achat([user("Q")])
        assert len(threads) >= 4
        assert threading.get_ident() not in threads

    record_threads(Chats, "prepare_turn")
    record_threads(Turn, "finish")
    with model_replying("hello there") as model:
        asyncio.run(chatted(model))


def test_errors_of_an_async_stream_are_raised_where_it_is_awaited() -> None:
    async def awaited(model: erllama.Model) -> None:
        stream = model.astream_chat([user("Q")], tols=TOOLS)  # type: ignore[call-arg]
        with pytest.raises(erllama.OptionError, match="tools"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(erllama.ChatError):
            await model.astream_chat([]).result()

    with model_replying("x") as model:
        asyncio.run(awaited(model))


def test_an_async_stream_cancelled_before_its_start_ends_as_cancelled() -> None:
    async def cancelled(model: erllama.Model) -> erllama.ChatCompletion:
        stream = model.astream_chat([user("Q")])
        stream.cancel()
        return await stream.result()

    with model_replying("hello there") as model:
        assert asyncio.run(cancelled(model)).finish_reason == "cancelled"
        assert model.pending == model.queue_depth == 0


def test_a_task_cancelled_while_its_stream_starts_makes_no_request() -> None:
    slow = "{% for i in range(300) %}{% for j in range(300) %}{% set x = i * j %}{% endfor %}{% endfor %}"

    async def abandoned(model: erllama.Model) -> None:
        task = asyncio.create_task(model.astream_chat([user("Q")]).result())
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with model_replying("hello there", template=slow + TEMPLATE) as model:
        asyncio.run(abandoned(model))
        assert model.metrics.prompt_tokens == model.pending == 0


def test_templates_are_applied_with_a_tenants_salt() -> None:
    with model_replying("hello there") as model:
        first = model.chat([user("Q")], cache_salt="one")
        messages = [user("Q"), first.message, user("and?")]
        n = len(first.context_tokens)
        assert tuple(model.apply_chat_template(messages, cache_salt="one")[:n].tolist()) == first.context_tokens
        assert tuple(model.apply_chat_template(messages)[:n].tolist()) != first.context_tokens
        with pytest.raises(erllama.OptionError, match="cache_salt"):
            model.apply_chat_template(messages, cache_salt="")


def test_tokens_without_text_are_replayed_in_place() -> None:
    vocabulary = PieceVocabulary(["he"], SPECIAL)
    reply = [*b"he", vocabulary.special["<|tool|>"], *b"he"]
    backend = ScriptedBackend(vocabulary, reply, chat_templates={"default": TEMPLATE})
    with erllama.load_backend(backend, cache=erllama.Cache()) as model:
        first = model.chat([user("Q")])
        assert first.text == "hehe"
        ids = model.apply_chat_template([user("Q"), first.message, user("and?")]).tolist()
        assert ids[: len(first.context_tokens)] == list(first.context_tokens)


def test_unfinished_thinking_returns_as_the_template_renders_it() -> None:
    with model_replying("<think>hm") as model:
        first = model.chat([user("Q")], **KEEP)
        assert (first.thinking, first.finish_reason) == ("hm", "stop")
        messages = [user("Q"), first.message, user("and?")]
        assert "</think>" in model.render_chat(messages, **KEEP)
        assert prompt_text(model, messages, **KEEP) == model.render_chat(messages, **KEEP)


def test_text_that_the_template_drops_is_not_part_of_the_next_prompt() -> None:
    template = TEMPLATE.replace("{{- m.content }}", "{%- if not m.tool_calls %}{{ m.content }}{% endif %}")
    with model_replying(f"Let me see. {CALL}", template=template) as model:
        first = model.chat([user("Q")], tools=TOOLS)
        assert first.text == "Let me see."
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "noon"}
        messages = [user("Q"), first.message, result]
        assert prompt_text(model, messages, tools=TOOLS) == model.render_chat(messages, tools=TOOLS)


def test_dropped_empty_thinking_is_not_part_of_the_next_prompt() -> None:
    with model_replying("<think>\n\n</think>hello there") as model:
        first = model.chat([user("Q")])
        messages = [user("Q"), first.message, user("and?")]
        assert prompt_text(model, messages) == model.render_chat(messages)


def test_invalid_bytes_end_the_reusable_part_of_a_reply_in_linear_time() -> None:
    backend = ScriptedBackend(
        VOCABULARY, [*b"hello", *([0xFF] * 3000)], chat_templates={"default": TEMPLATE}, n_ctx=8192
    )
    with erllama.load_backend(backend, cache=erllama.Cache()) as model:
        first = model.chat([user("Q")], max_tokens=3000)
        messages = [user("Q"), {"role": "assistant", "content": "hello"}, user("and?")]
        n = first.usage.prompt + len("hello")
        assert model.apply_chat_template(messages)[:n].tolist() == list(first.context_tokens[:n])
