"""The runner of llama.cpp's own tests: its exceptions, templates and stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from erllama.chat.templates.template import ChatTemplate
from scripts.llama_server_tests.__main__ import print_table, read_outcomes
from scripts.llama_server_tests.exceptions import EXCEPTIONS, reason
from scripts.llama_server_tests.templates import write_templates

TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What time is it?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "get_time", "arguments": {"in": "Oslo"}}}],
    },
    {"role": "tool", "content": "noon"},
]


def test_a_pattern_matches_tests_with_parameters() -> None:
    assert reason("test_chat_completion.py::test_invalid_chat_completion_req[messages7]")
    assert reason("test_chat_completion.py::test_invalid_chat_completion_req[messages6]") is None
    assert reason("test_security.py::test_local_media_file[../../../tools-file://mtmd/test-1.jpeg-True]")
    assert all(EXCEPTIONS.values())


def test_a_missing_test_fails_the_run_and_an_exception_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    known, unknown = "test_basic.py::test_no_ui", "test_basic.py::test_server_props"
    assert print_table({known: "passed", unknown: "passed"}, {known: "failed", unknown: "passed"})
    assert not print_table({unknown: "passed"}, {unknown: "failed"})
    assert "MISSING" in capsys.readouterr().out


def test_outcomes_are_read_from_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    names = '<testcase classname="unit.test_a" name="b[1]"/>', '<testcase classname="unit.test_a" name="c"><error/>'
    cases = "".join((*names, "</testcase>"))
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert read_outcomes(report) == {"test_a.py::b[1]": "passed", "test_a.py::c": "failed"}


def test_the_templates_write_messages_tools_and_the_start_of_a_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    write_templates(tmp_path)
    files = sorted(tmp_path.glob("*.jinja"))
    assert files
    for file in files:
        template = ChatTemplate(file.read_text())
        open_end = template.render(CONVERSATION, tools=[TOOL])
        closed = template.render(CONVERSATION, tools=[TOOL], add_generation_prompt=False)
        assert open_end.startswith(closed), file.name
        assert len(open_end) > len(closed)
        assert "What time is it?" in closed
        assert "noon" in closed


def test_the_templates_of_a_checkout_are_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "checkout" / "models" / "templates"
    source.mkdir(parents=True)
    (source / "x.jinja").write_text("x")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "checkout"))
    write_templates(tmp_path / "target")
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["x.jinja"]
