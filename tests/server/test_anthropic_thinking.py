"""Thinking in Anthropic's Messages API: its options, its signatures, and its way back into the prompt."""

from __future__ import annotations

from pathlib import Path

import anthropic
import pytest

import erllama
from support.anthropic_clients import TOOLS, client_replying, prompt_tokens
from support.chat.scripted_model import CALL

HELLO = [{"role": "user", "content": "hello"}]
THOUGHTFUL = "<think>A plan.</think>Good day."


def create(client: anthropic.Anthropic, messages: list[dict[str, object]], **options: object):
    return client.messages.create(**{"model": "any", "max_tokens": 200, "messages": messages, **options})


def count(client: anthropic.Anthropic, messages: list[dict[str, object]]) -> int:
    return client.messages.count_tokens(model="any", messages=messages).input_tokens


def answered(content: object) -> list[dict[str, object]]:
    return [*HELLO, {"role": "assistant", "content": content}, *HELLO]


def test_a_thought_returns_into_the_prompt_and_is_warm() -> None:
    with client_replying(THOUGHTFUL) as client:
        first = create(client, HELLO)
        assert [block.type for block in first.content] == ["thinking", "text"]
        assert first.content[0].thinking == "A plan."
        assert first.content[0].signature
        second = create(client, answered([block.to_dict() for block in first.content]))
        before = prompt_tokens(first.usage) + first.usage.output_tokens
        assert second.usage.cache_read_input_tokens >= before


@pytest.mark.parametrize("changes", [{"signature": "AAAA"}, {"thinking": "Another plan."}])
def test_a_thought_that_the_server_did_not_sign_is_skipped(changes: dict[str, str]) -> None:
    with client_replying(THOUGHTFUL) as client:
        blocks = [block.to_dict() for block in create(client, HELLO).content]
        changed = [{**blocks[0], **changes}, blocks[1]]
        assert count(client, answered(changed)) == count(client, answered("Good day."))
        assert create(client, answered(changed)).stop_reason == "end_turn"
        assert count(client, answered(blocks)) > count(client, answered(changed))


def test_a_thought_without_a_signature_is_kept() -> None:
    with client_replying(THOUGHTFUL) as client:
        blocks = [block.to_dict() for block in create(client, HELLO).content]
        unsigned = [{**blocks[0], "signature": ""}, blocks[1]]
        assert count(client, answered(unsigned)) == count(client, answered(blocks))


def test_a_hidden_thought_returns_within_its_signature() -> None:
    with client_replying(THOUGHTFUL) as client:
        shown = create(client, HELLO, thinking={"type": "adaptive"})
        hidden = create(client, HELLO, thinking={"type": "adaptive", "display": "omitted"})
        assert (shown.content[0].thinking, hidden.content[0].thinking) == ("A plan.", "")
        counts = [count(client, answered([b.to_dict() for b in each.content])) for each in (shown, hidden)]
        assert counts[0] == counts[1] > count(client, answered("Good day."))
        with client.messages.stream(
            model="any", max_tokens=200, messages=HELLO, thinking={"type": "adaptive", "display": "omitted"}
        ) as stream:
            assert stream.get_final_message().content[0] == hidden.content[0]


def test_a_thought_that_is_cut_short_has_a_signature() -> None:
    with client_replying(THOUGHTFUL) as client:
        cut = create(client, HELLO, max_tokens=len("<think>A pl"))
        assert [block.type for block in cut.content] == ["thinking"]
        block = cut.content[0].to_dict()
        text = {"type": "text", "text": "x"}
        assert count(client, answered([block, text])) > count(client, answered("x"))


def test_interleaved_thinking_keeps_its_order_and_signatures() -> None:
    with client_replying(f"<think>One.</think>I look.<think>Two.</think>Now.{CALL}", "End.") as client:
        first = create(client, HELLO, tools=TOOLS)
        kinds = ["thinking", "text", "thinking", "text", "tool_use"]
        assert [block.type for block in first.content] == kinds
        blocks = [block.to_dict() for block in first.content]
        result = {"type": "tool_result", "tool_use_id": blocks[4]["id"], "content": "12:00"}

        def length(content: list[dict[str, object]]) -> int:
            messages = [*HELLO, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
            return client.messages.count_tokens(model="any", messages=messages, tools=TOOLS).input_tokens

        assert length(blocks) >= length([*blocks[:2], *blocks[3:]]) + len("Two.")
        assert length(blocks) == length([*blocks[:2], {**blocks[2], "signature": ""}, *blocks[3:]])
        # The second signature is that of both thoughts.
        assert length(blocks[1:]) == length([blocks[1], *blocks[3:]])
        with client.messages.stream(model="any", max_tokens=200, messages=HELLO, tools=TOOLS) as stream:
            assert [block.type for block in stream.get_final_message().content] == kinds


def test_replies_that_a_client_splits_or_joins_stay_valid() -> None:
    with client_replying(THOUGHTFUL) as client:
        first, second = (create(client, HELLO).content for _ in range(2))
        blocks = [block.to_dict() for block in (*first, *second)]
        whole = [*HELLO, {"role": "assistant", "content": blocks}, *HELLO]
        split = [*HELLO, *({"role": "assistant", "content": [block]} for block in blocks), *HELLO]
        without = [*HELLO, {"role": "assistant", "content": [blocks[1], blocks[3]]}, *HELLO]
        assert count(client, whole) == count(client, split) >= count(client, without) + 2 * len("A plan.")


def test_thinking_is_enabled_with_a_budget_and_disabled() -> None:
    with client_replying("<think>" + "a" * 50 + "</think>Good day.") as client:
        limited = create(client, HELLO, thinking={"type": "enabled", "budget_tokens": 8})
        assert 0 < len(limited.content[0].thinking) <= 8
        assert limited.content[0].type == "thinking"
        off = create(client, HELLO, thinking={"type": "disabled"})
        assert "thinking" not in [block.type for block in off.content]


def test_a_budget_does_not_matter_to_a_model_that_cannot_think() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ '<|assistant|>\t' }}"
    with client_replying("Good day.", template=template) as client:
        message = create(client, HELLO, thinking={"type": "enabled", "budget_tokens": 1024})
        assert message.content[0].text == "Good day."


def test_thoughts_are_valid_after_a_restart_with_a_cache_directory(tmp_path: Path) -> None:
    counts = []
    blocks: list[dict[str, object]] = []
    for directory in ("kv", "kv", "other"):
        with erllama.Cache(disk=tmp_path / directory) as cache, client_replying(THOUGHTFUL, cache=cache) as client:
            blocks = blocks or [block.to_dict() for block in create(client, HELLO).content]
            plain = count(client, answered("Good day."))
            counts.append(count(client, answered(blocks)) - plain)
    assert counts[0] == counts[1] > counts[2] == 0
