"""The example of the page about OpenAI's API runs."""

from __future__ import annotations

import pytest

from support.chat.scripted_model import model_replying
from support.doc_pages import blocks
from support.http_server import running_server


def test_the_example_of_the_page_prints_a_reply(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("docs/server/openai.md", "python")
    with model_replying("Paris.") as model, running_server(model) as server:
        names: dict[str, object] = {}
        exec(example.text.replace("http://127.0.0.1:8080", server.url), names)
        names["client"].close()  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "Paris.\n0 tokens came from the cache\n"
