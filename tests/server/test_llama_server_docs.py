"""The example of the page about llama-server's endpoints runs."""

from __future__ import annotations

import pytest

from support.doc_pages import blocks


def test_the_example_of_the_page_prints_a_completion(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("docs/server/llama-server.md", "python")
    exec(example.text.replace("erllama.demo_model()", "erllama.demo_model(), n_threads=1"), {})
    assert capsys.readouterr().out.strip().endswith(" 16")
