"""Codex and OpenCode: each request computes only what is new, also the first one after the server was killed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from scripts.agents.agent import PROMPTS, Agent
from scripts.agents.codex import Codex
from scripts.agents.models import Call, write_scripted_model
from scripts.agents.opencode import OpenCode
from scripts.agents.report import MIN_SHARE
from support.agent_conversations import AgentConversation, CodexConversation, OpenCodeConversation, Reply
from support.warm_server import WarmServer

AGENTS: dict[str, tuple[Agent, type[CodexConversation | OpenCodeConversation]]] = {
    "codex": (Codex(), CodexConversation),
    "opencode": (OpenCode(), OpenCodeConversation),
}
N_CTX = 16384
# Tokens that a template writes after a reply in another way than the model did.
N_TEMPLATE = 4


@pytest.fixture(params=AGENTS)
def agent(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(agent: str, tmp_path: Path) -> Path:
    return write_scripted_model(tmp_path / "agent.gguf", AGENTS[agent][0].script(Path("/project")))


def scripted_texts(agent: str, turn: int) -> list[str]:
    """Return the texts of a turn's replies: of a call, the thinking."""
    script = AGENTS[agent][0].script(Path("/project"))
    return [
        reply.thinking if isinstance(reply, Call) else reply for reply in (script.later if turn else script.first)
    ]


def check_warm(replies: list[Reply]) -> None:
    """Check that no reply after the first one computed tokens of earlier requests and replies again."""
    for before, after in pairwise(replies):
        assert after.n_cached >= before.n_prompt + before.n_reply - N_TEMPLATE
        assert after.n_cached / after.n_prompt >= MIN_SHARE


@pytest.mark.slow
def test_requests_after_the_first_are_warm_also_after_a_kill(agent: str, model: Path, tmp_path: Path) -> None:
    make_conversation = AGENTS[agent][1]
    replies: list[Reply] = []
    with WarmServer(model, tmp_path / "kv", n_ctx=N_CTX) as server:
        conversation: AgentConversation = make_conversation(server.url)
        for turn, prompt in enumerate(PROMPTS):
            if turn == len(PROMPTS) - 1:
                server.wait_until_written()
                server.kill()
                server.start()
                conversation.connect(server.url)
            if isinstance(conversation, OpenCodeConversation) and turn == 0:
                assert conversation.ask_for_title(prompt).text == "Notes with a new line"
            added = conversation.ask(prompt)
            assert [reply.thinking.strip() or reply.text for reply in added] == scripted_texts(agent, turn)
            replies += added
    check_warm(replies)
