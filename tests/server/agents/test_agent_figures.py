"""The runner of the agents: figures from an access log, and the configurations of the pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.agents import codex, opencode
from scripts.agents.models import _unique_pieces
from scripts.agents.report import Conversation, print_table
from scripts.agents.requests import read_requests
from support.doc_pages import blocks

SYSTEM = {"role": "system", "content": "Be brief."}


def line(messages: list[Mapping[str, str]], prompt: int, cached: int, **more: object) -> tuple[int, dict[str, Any]]:
    counts = {"prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": 10, "first_token": 0.5}
    return 1, {"prompt": messages, **counts, **more}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_request_is_compared_with_the_one_before_in_its_conversation() -> None:
    title = [{"role": "system", "content": "Write a title."}, user("a")]
    first, warm, cold = read_requests(
        [
            line([SYSTEM, user("a")], 1000, 0),
            line([SYSTEM, user("a"), user("b")], 1100, 1010),
            line([SYSTEM, user("x"), user("b"), user("c")], 1200, 200),
        ]
    )
    assert (first.is_first, first.cause) == (True, "")
    assert (warm.is_first, warm.recomputed, warm.cause) == (False, 0, "")
    assert cold.recomputed > 800
    assert cold.cause == "the client changed message 1 (user)"
    assert [each.is_first for each in read_requests([line(title, 50, 0), line([SYSTEM, user("a")], 1000, 0)])] == [
        True,
        True,
    ]


def test_a_changed_rendering_is_told_apart_from_changed_messages() -> None:
    notes = ["prefix changed at token 7 of 1100"]
    _, cold = read_requests([line([SYSTEM], 1000, 0), line([SYSTEM, user("b")], 1100, 7, notes=notes)])
    assert cold.cause == "tools, the reply or its rendering changed; prefix changed at token 7 of 1100"


def test_requests_below_the_share_are_misses(capsys: pytest.CaptureFixture[str]) -> None:
    requests = read_requests([line([SYSTEM], 1000, 0), line([SYSTEM], 1000, 949), line([SYSTEM], 1000, 950)])
    conversation = Conversation("agent", requests)
    assert conversation.misses() == [requests[1]]
    print_table([conversation])
    assert "94.9%" in capsys.readouterr().out


def test_no_two_pieces_of_the_scripts_are_equal() -> None:
    for agent in (codex.Codex(), opencode.OpenCode()):
        texts = list(agent.script(Path("/project")).replies().values())
        pieces = _unique_pieces(texts)
        assert ["".join(each) for each in pieces] == texts
        flat = [piece for each in pieces for piece in each]
        assert len(set(flat)) == len(flat)
        assert min(map(len, flat)) > 1


@pytest.mark.parametrize(
    ("page", "language", "configuration"),
    [("codex", "toml", codex.CONFIGURATION), ("opencode", "json", opencode.CONFIGURATION)],
)
def test_the_pages_have_the_configurations_that_were_run(page: str, language: str, configuration: str) -> None:
    assert [block.text for block in blocks(f"docs/server/clients/{page}.md", language)] == [configuration]
