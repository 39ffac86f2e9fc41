"""A conversation as Claude Code sends it: from the second request on, only new tokens are computed."""

from __future__ import annotations

import logging

import anthropic
import pytest

from support.anthropic_clients import TOOLS, client_replying, prompt_tokens
from support.chat.scripted_model import CALL

INSTRUCTIONS = "".join(f"Rule {n}: read file {n * 7919 % 1000} before you edit it.\n" for n in range(30))
# What the template puts between a reply and what follows it.
_TEMPLATE_TOKENS = 4


def claude_code_system(turn: int) -> list[dict[str, object]]:
    """The system blocks of a request: the first one differs in each."""
    cached = {"type": "ephemeral"}
    return [
        {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.101.e5{turn}; cch={turn * 7:05x};"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": cached},
        {"type": "text", "text": f"\n{INSTRUCTIONS}", "cache_control": cached},
    ]


def run_conversation(
    client: anthropic.Anthropic, turns: int, system=claude_code_system
) -> list[anthropic.types.Usage]:
    """Run a conversation in which each reply calls a tool; return the token counts of each request."""
    content: list[dict[str, object]] = [{"type": "text", "text": "What time is it?"}]
    messages: list[dict[str, object]] = []
    counts = []
    for turn in range(turns):
        # The breakpoint moves to the end of the conversation with each request.
        last = {**content[-1], "cache_control": {"type": "ephemeral"}}
        sent = [*messages, {"role": "user", "content": [*content[:-1], last]}]
        with client.messages.stream(
            model="any",
            max_tokens=200,
            system=system(turn),
            tools=TOOLS,
            messages=sent,
            metadata={"user_id": "session"},
            thinking={"type": "adaptive"},
        ) as stream:
            reply = stream.get_final_message()
        counts.append(reply.usage)
        call = reply.content[-1]
        assert isinstance(call, anthropic.types.ToolUseBlock)
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": reply.content}]
        content = [
            {"type": "tool_result", "tool_use_id": call.id, "content": f"12:0{turn}", "is_error": False},
            {"type": "text", "text": "<system-reminder>Be brief.</system-reminder>"},
        ]
    return counts


def computed_again(counts: list[anthropic.types.Usage]) -> list[int]:
    """Return, for each request but the first, how many tokens of the earlier conversation it computed."""
    totals = [prompt_tokens(usage) + usage.output_tokens for usage in counts]
    return [
        before - (usage.cache_read_input_tokens or 0) for before, usage in zip(totals, counts[1:], strict=False)
    ]


def test_only_new_tokens_are_computed_from_turn_two_on() -> None:
    with client_replying(f"<think>Hm.</think>I look.{CALL}") as client:
        counts = run_conversation(client, 5)
    assert counts[0].cache_read_input_tokens == 0
    assert all(n <= _TEMPLATE_TOKENS for n in computed_again(counts)), computed_again(counts)


def test_the_billing_header_defeats_the_cache_if_it_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "erllama.server"),
        client_replying(CALL, drop_unstable_headers=False) as client,
    ):
        counts = run_conversation(client, 3)
    assert all(n > len(INSTRUCTIONS) // 2 for n in computed_again(counts))
    assert sum("prefix changed at token" in line for line in caplog.messages) >= 2


def test_a_clock_in_the_first_line_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "erllama.server"), client_replying(CALL) as client:
        run_conversation(client, 3, lambda turn: f"It is 12:0{turn}.\n{INSTRUCTIONS}")
    notes = [line for line in caplog.messages if '"notes":["prefix changed at token' in line]
    assert len(notes) == 2


def test_a_stable_conversation_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "erllama.server"), client_replying(CALL) as client:
        run_conversation(client, 3)
        run_conversation(client, 2)
    assert not [line for line in caplog.messages if "prefix changed" in line]
