"""The programs on the pages of Python clients run: tools are called, replies streamed, and prompts cached."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.chat.scripted_model import CALL, model_replying
from support.doc_pages import blocks
from support.http_server import running_server
from support.paths import ROOT

# LlamaIndex needs an older release of `openai` than the other tests.
LLAMAINDEX = ROOT / ".venv" / "llamaindex" / "bin" / "python"
PAGES = {
    "langchain": (sys.executable, "It is noon.\n"),
    "litellm": (sys.executable, "It is noon.\n"),
    "llamaindex": (str(LLAMAINDEX), "It is noon.\n"),
    "pydantic-ai": (sys.executable, "It is noon.\nThere, too.\n"),
}
# Without them, LiteLLM would fetch a list of prices, and clients would report to services.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "OPENAI_API_KEY": ""}


@pytest.mark.parametrize("name", PAGES)
def test_the_program_of_a_page_runs(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (program,) = blocks(f"docs/server/clients/{name}.md", "python")
    python, output = PAGES[name]
    with caplog.at_level(logging.INFO, "erllama.server.access"):
        with model_replying(CALL, "It is noon.", "There, too.") as model, running_server(model) as server:
            finished = subprocess.run(
                [python, "-c", program.text.replace("http://127.0.0.1:8080", server.url)],
                capture_output=True,
                text=True,
                timeout=300,
                cwd=tmp_path,
                env={**os.environ, **OFFLINE},
                check=False,
            )
    assert finished.returncode == 0, finished.stderr
    calls = [json.loads(message) for message in caplog.messages]
    assert {call["path"] for call in calls} == {"/v1/chat/completions"}
    last, before = calls[-1], calls[-2]
    assert finished.stdout == f"{output}{last['cached_tokens']} tokens came from the cache\n"
    # LlamaIndex asks for at most one call. The marker that ends it is then not computed with the reply.
    n_marker = len("</tool_call>") if name == "llamaindex" else 2
    assert last["cached_tokens"] >= before["prompt_tokens"] + before["completion_tokens"] - n_marker
