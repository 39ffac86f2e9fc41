"""Conversations stay warm: each turn computes only what is new, in each API, even after a server was killed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from erllama.testing.scripted import END, write_scripted
from support.chat.scripted_model import TOOLS
from support.speakers import SPEAKERS, Answer
from support.warm_server import WarmServer

N_TURNS = 30
KILLED_AFTER = (10, 20)
# Tokens that the template writes around a turn: the end of the reply, the role, and the beginning of the next one.
N_TEMPLATE = 4

TEMPLATE = (
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


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks, calls a tool, and answers after its result, in other tokens than those of the text."""
    pieces = ['{"name": ', '"get_time", "arguments": ', '{"city": "Oslo"}}']
    call = ["<|assistant|>", "<think>", "h", "m", "</think>", "<tool_call>", *pieces, "</tool_call>", END]
    answer = ["<|answer|>", *"It's done", END]
    special = [f"<|{name}|>" for name in ("system", "user", "assistant", "answer")]
    special += ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    return write_scripted(
        tmp_path_factory.mktemp("agent") / "agent.gguf",
        dict(pairwise(call)) | dict(pairwise(answer)),
        words=[*pieces, "done", "hm"],
        special=special,
        chat_template=TEMPLATE,
    )


def message(turn: int) -> str:
    return f"question {turn}: what time is it?" if turn % 2 else f"{turn} o'clock"


def check_turn(turn: int, answer: Answer, before: Answer | None) -> None:
    """Check that a reply is the scripted one, and that only the new part of its prompt was computed."""
    if turn % 2:
        assert answer.calls == [("get_time", {"city": "Oslo"})]
    else:
        assert answer.text == "It's done"
    if before is not None:
        n_new = answer.n_prompt - before.n_prompt - before.n_reply
        assert n_new <= len(message(turn).encode()) + N_TEMPLATE, f"turn {turn} changes the tokens of earlier turns"
        assert answer.n_cached >= before.n_prompt + before.n_reply, f"turn {turn} computes earlier turns again"


@pytest.mark.slow
@pytest.mark.parametrize("process", [True, False], ids=["own-process", "in-process"])
@pytest.mark.parametrize("api", SPEAKERS)
def test_a_killed_server_continues_a_warm_conversation(
    api: str, process: bool, agent: Path, tmp_path: Path
) -> None:
    make_speaker = SPEAKERS[api]
    with WarmServer(agent, tmp_path / "cache", process=process) as server:
        speaker = make_speaker(server.url, TOOLS)
        before: Answer | None = None
        for turn in range(1, N_TURNS + 1):
            answer = speaker.ask(message(turn)) if turn % 2 else speaker.send_result(message(turn))
            check_turn(turn, answer, before)
            before = answer
            if turn in KILLED_AFTER:
                server.wait_until_written()
                server.kill()
                server.start()
                speaker.connect(server.url)
