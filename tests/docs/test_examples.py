"""Every example, and every snippet of some pages, runs away from the checkout against the installed package."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from erllama.testing.bert import write_bert
from erllama.testing.models import write_gemma3, write_lfm2, write_llama, write_lora, write_mamba
from erllama.testing.scripted import write_scripted
from support.doc_pages import SCRIPTS, blocks
from support.paths import ROOT, TESTS

EXAMPLES = ROOT / "examples"
# The examples that are tests need no plugin. Some take seconds to import.
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
WITHOUT_LIBLLAMA = "import sys; sys.modules['erllama.llama_ffi'] = None; import runpy; runpy.run_path(sys.argv[1])"


PYTEST = ("-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider")


def run(*arguments: object, cwd: Path, environment: Mapping[str, str | None] | None = None) -> str:
    """Return the output of a program, with changes to its environment; None removes a variable."""
    changed = {**ENVIRONMENT, **(environment or {})}
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={name: value for name, value in changed.items() if value is not None},
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def numbers(pattern: str, output: str) -> list[tuple[int, ...]]:
    """Return the groups of every match as numbers."""
    return [tuple(map(int, match.groups())) for match in re.finditer(pattern, output)]


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("[!_]*.py")} == {
        "adapters.py",
        "agents.py",
        "chat.py",
        "cold_and_warm.py",
        "embeddings.py",
        "http_server.py",
        "inspect_cache.py",
        "load_options.py",
        "many_at_once.py",
        "memory_pressure.py",
        "numpy_backend.py",
        "observe.py",
        "one_shot.py",
        "sessions.py",
        "several_models.py",
        "smoke_test.py",
        "speculation.py",
        "stop_sequences.py",
        "streaming.py",
        "structured_output.py",
        "test_end_to_end.py",
        "test_my_cache.py",
        "thinking.py",
        "tools.py",
        "warm.py",
    }


def test_the_smoke_test_needs_no_model(tmp_path: Path) -> None:
    output = run("-c", WITHOUT_LIBLLAMA, EXAMPLES / "smoke_test.py", cwd=tmp_path)
    assert "3 tokens from disk: b'hi'" in output
    assert "saves_cold: 1\nmisses: 1\nhits_exact: 1\n" in output


def test_cache_tests_need_no_model(tmp_path: Path) -> None:
    few = ("-p", "support.few_examples")  # the harness has tests of its own with more
    output = run(*PYTEST, *few, EXAMPLES / "test_my_cache.py", cwd=tmp_path, environment={"PYTHONPATH": str(TESTS)})
    assert "2 passed" in output


@pytest.mark.parametrize("write", [write_llama, write_gemma3, write_mamba, write_lfm2])
def test_the_end_to_end_example_runs_on_every_kind_of_memory(write: Callable[..., Path], tmp_path: Path) -> None:
    given = {"ERLLAMA_MODEL": str(write(tmp_path / "mine.gguf", seed=5))}
    output = run(*PYTEST, EXAMPLES / "test_end_to_end.py", cwd=tmp_path, environment=given)
    assert "6 passed" in output


def test_the_end_to_end_example_skips_without_a_model(tmp_path: Path) -> None:
    output = run(*PYTEST, EXAMPLES / "test_end_to_end.py", cwd=tmp_path, environment={"ERLLAMA_MODEL": None})
    assert "6 skipped" in output


def test_cold_and_cached_times_are_printed_side_by_side(tmp_path: Path) -> None:
    output = run(EXAMPLES / "cold_and_warm.py", cwd=tmp_path)
    rows = re.findall(r"^ *(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [256, 512, 1024]
    assert all(float(time) > 0 for row in rows for time in row[1:4])
    ((tokens, computed),) = numbers(r"4 agents: (\d+) prompt tokens, (\d+) computed", output)
    assert computed <= tokens - 3 * 1023, "the prefix is computed once"


def test_a_custom_backend_returns_the_reply_of_libllama(tmp_path: Path) -> None:
    output = run(EXAMPLES / "numpy_backend.py", cwd=tmp_path)
    assert "numpy, exact hit:" in output
    assert "the same reply" in output


@pytest.mark.parametrize("name", ["inspect_cache.py", "memory_pressure.py"])
def test_every_example_runs(name: str, tmp_path: Path) -> None:
    output = run(EXAMPLES / name, cwd=tmp_path)
    if name == "inspect_cache.py":
        assert "hits_longest_prefix: 1" in output
        assert "no problems" in output


def test_examples_accept_a_model_of_the_user(tmp_path: Path) -> None:
    output = run(EXAMPLES / "one_shot.py", write_llama(tmp_path / "mine.gguf", seed=3), cwd=tmp_path)
    assert output != run(EXAMPLES / "one_shot.py", cwd=tmp_path)
    assert "the same reply" in output


def test_one_shot_finds_its_prompt_after_a_restart(tmp_path: Path) -> None:
    output = run(EXAMPLES / "one_shot.py", cwd=tmp_path)
    assert "cold: 0 of 52 prompt tokens from the cache; tier None" in output
    assert "exact: 51 of 52 prompt tokens from the cache; tier disk" in output
    assert "the same reply" in output


def test_the_server_finds_the_conversation_of_the_turn_before(tmp_path: Path) -> None:
    # A temporary handler: tests that run in the background may ignore Ctrl-C, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server = subprocess.Popen(
            [sys.executable, EXAMPLES / "http_server.py"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        conversation = "User: hello\nAssistant:"
        for _ in range(2):
            with urllib.request.urlopen(address, conversation.encode(), timeout=60) as answer:
                reply = answer.read().decode()
            assert reply
            conversation += f"{reply}\nUser: tell me a joke\nAssistant:"
        server.send_signal(signal.SIGINT)
        output = server.communicate(timeout=60)[0]
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0
    (cold, before_hits), (warm, hits) = numbers(
        r"(\d+) prompt tokens from the cache; hits_longest_prefix: (\d+)", output
    )
    assert (cold, before_hits, hits) == (0, 0, 1)
    assert warm >= len("User: hello\nAssistant:")
    assert output.endswith("stopped\n")


def test_the_sessions_example_computes_no_turn_twice(tmp_path: Path) -> None:
    output = run(EXAMPLES / "sessions.py", cwd=tmp_path)
    for way, tier in (("by key", "ram"), ("session", "live")):
        turns = numbers(rf"{way}: (\d+) of (\d+) prompt tokens from the cache; tier \w+", output)
        # 20 tokens per reply. The last one takes no cell.
        assert [warm for warm, _ in turns[1:]] == [prompt + 20 - 1 for _, prompt in turns[:-1]]
        assert output.count(f"tier {tier}") >= 2
    assert "hits_resume: 2" in output
    assert "session ended: True; ended again: False" in output


def test_several_models_share_a_cache_but_no_prompt(tmp_path: Path) -> None:
    output = run(EXAMPLES / "several_models.py", cwd=tmp_path)
    assert re.findall(r"^(.+): (cold|exact)", output, re.MULTILINE) == [
        ("tiny", "cold"),
        ("big", "cold"),
        ("tiny", "exact"),
        ("tiny too", "exact"),
    ]
    replies = re.findall(r"^(\w+)[^;\n]*; ('.*')$", output, re.MULTILINE)
    assert len({reply for name, reply in replies if name == "tiny"}) == 1
    assert len({reply for _, reply in replies}) == 2
    assert "loaded: []; 2 exact hits" in output


def test_agents_compute_their_system_prompt_once(tmp_path: Path) -> None:
    output = run(EXAMPLES / "agents.py", cwd=tmp_path)
    counts = numbers(r"8 prompts, (\d+) tokens; (\d+) computed, (\d+) shared; (\d+) in the system prompt", output)
    assert len(counts) == 2
    for tokens, computed, shared, system in counts:
        assert computed + shared == tokens
        assert computed <= tokens - 7 * (system - 1)


def test_cancelled_streams_end(tmp_path: Path) -> None:
    output = run(EXAMPLES / "streaming.py", cwd=tmp_path)
    ends = re.findall(r"^(\w+): cancelled after (\d+) tokens$", output, re.MULTILINE)
    assert [name for name, _ in ends] == ["stream", "astream"]
    assert all(0 < int(n) < 4000 for _, n in ends)


def test_a_stop_string_is_reported_and_not_streamed(tmp_path: Path) -> None:
    output = run(EXAMPLES / "stop_sequences.py", cwd=tmp_path)
    (free,) = re.findall(r"^without: '(.*)', ended by 'length'$", output, re.MULTILINE)
    (stop,) = re.findall(r"^with \['(.+?)', ", output, re.MULTILINE)
    (text,) = re.findall(rf"^with .*: '(.*)', ended by 'stop' at '{re.escape(stop)}'$", output, re.MULTILINE)
    assert text == free[: free.index(stop)]
    (streamed,) = re.findall(r"^streamed: \[(.*)\], then", output, re.MULTILINE)
    assert streamed.replace("', '", "").strip("'") == text


def test_prefilled_tokens_are_not_computed_again(tmp_path: Path) -> None:
    output = run(EXAMPLES / "warm.py", cwd=tmp_path)
    ((read,),) = numbers(r"prefilled: (\d+) tokens", output)
    assert re.search(r"stored as [0-9a-f]{12}; reply ''", output)
    for warm, computed in (found := numbers(r"question: (\d+) tokens from the cache, (\d+) computed", output)):
        assert warm >= read
        assert computed < 40
    assert len(found) == 2


def test_a_chat_starts_each_turn_where_the_last_one_ended(tmp_path: Path) -> None:
    output = run(EXAMPLES / "chat.py", cwd=tmp_path)
    (prompt, _, completion), (_, again, _), *_ = numbers(r"prompt=(\d+), cached=(\d+), completion=(\d+)", output)
    assert again == prompt + completion, "the whole first turn, including its reply"
    assert "What is 23 + 17? -> '23 + 17 = 40.'" in output
    assert "And minus 5? -> '40 - 5 = 35.'" in output


def test_the_requested_document_is_found(tmp_path: Path) -> None:
    output = run(EXAMPLES / "embeddings.py", cwd=tmp_path)
    assert "4 documents, 64 dimensions" in output
    assert re.search(r"^1\.00  'a kettle is for boiling water'$", output, re.MULTILINE)
    found = re.findall(r"^(-?\d\.\d\d)  '", output, re.MULTILINE)
    assert len(found) == 4
    assert found == sorted(found, key=float, reverse=True)


def test_thinking_is_separated_from_the_answer(tmp_path: Path) -> None:
    output = run(EXAMPLES / "thinking.py", cwd=tmp_path)
    assert "answer:    '23 + 17 = 40.'" in output
    assert re.search(r"signature: [0-9a-f]{64}\n", output)
    assert re.search(r"complete:  '(.*)', '23 \+ 17 = 40\.'", output)
    assert re.search(r"with a budget: '.{1,30} That will do\.', '.+'", output)


def test_a_tool_is_called_and_its_result_used(tmp_path: Path) -> None:
    output = run(EXAMPLES / "tools.py", cwd=tmp_path)
    assert "get_time({'city': 'Oslo'}) -> 12:30" in output
    assert "answer: 'It is 12:30 in Oslo.'" in output


def test_speculation_returns_the_same_reply(tmp_path: Path) -> None:
    output = run(EXAMPLES / "speculation.py", cwd=tmp_path)
    assert "the same reply" in output
    assert "5 of 5 proposed tokens accepted" in output


def test_replies_follow_grammars(tmp_path: Path) -> None:
    output = run(EXAMPLES / "structured_output.py", cwd=tmp_path)
    assert re.search(r"GBNF:        \{'n': \d\}\n", output)
    assert re.search(r"JSON schema: \{'city': '(Oslo|Paris)', 'celsius': -?\d+\}\n", output)
    assert re.search(r"regex:       \d{4}-\d\d-\d\d\n", output)


def test_more_requests_than_may_run_wait(tmp_path: Path) -> None:
    output = run(EXAMPLES / "many_at_once.py", cwd=tmp_path)
    assert "4 running, 2 waiting" in output
    assert numbers(r"worker (\d), seed (\d)", output) == [(n, n) for n in range(6)]
    ((tokens, decodes),) = numbers(r"(\d+) tokens in (\d+) decodes; 0 waiting", output)
    assert decodes < tokens / 2


def test_models_with_different_load_options_share_no_kv(tmp_path: Path) -> None:
    output = run(EXAMPLES / "load_options.py", cwd=tmp_path)
    kinds = re.findall(r"^(.*): (cold|exact), [\d.]+ MiB of KV$", output, re.MULTILINE)
    assert [kind for _, kind in kinds] == ["cold", "exact", "cold", "cold", "cold"]
    assert re.search(r"^CPU: cpu, .+ GiB$", output, re.MULTILINE)
    assert output.count("refused: ") == 2


def test_different_adapters_share_no_kv(tmp_path: Path) -> None:
    output = run(EXAMPLES / "adapters.py", cwd=tmp_path)
    found = re.findall(r"^(without|half|whole): (\w+); (.*)$", output, re.MULTILINE)
    assert [(how, kind) for how, kind, _ in found] == [
        ("without", "cold"),
        ("half", "cold"),
        ("whole", "cold"),
        ("half", "exact"),
        ("without", "exact"),
    ]
    assert len({(how, text) for how, _, text in found}) == len({text for _, _, text in found}) == 3
    assert "loaded: [('lora.gguf', 0.5)]" in output
    assert "started before the change: exact" in output
    assert "the file is not an adapter" in output


def test_a_running_model_can_be_observed(tmp_path: Path) -> None:
    output = run(EXAMPLES / "observe.py", cwd=tmp_path)
    assert "before: idle, 0 running, 0 waiting" in output
    assert "busy: generating, 2 running, 1 waiting" in output
    assert "after: idle, 0 running, 0 waiting" in output
    assert numbers(r"; (\d) running in all models", output) == [(0,), (2,), (0,)]
    # BOS and ten times the 29 bytes of the system prompt, which is the only prefilled text.
    assert numbers(r"(\d+) tokens of the next prompt are cached", output)[:2] == [(0,), (291,)]


@pytest.mark.parametrize("page", SCRIPTS)
def test_the_snippets_of_a_page_run(page: str, tmp_path: Path) -> None:
    """Run them in order, as a reader would, with models of those names in the directory."""
    found = [block.text for block in blocks(f"docs/{page}.md", "python")]
    assert found
    write_llama(tmp_path / "model.gguf", seed=1)
    write_lora(tmp_path / "lora.gguf", seed=1)
    if page == "embeddings":
        write_bert(tmp_path / "reranker.gguf", pooling="rank")
        write_scripted(tmp_path / "coder.gguf", {}, special=["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    (tmp_path / "snippets.py").write_text("\n".join(found))
    run("snippets.py", cwd=tmp_path, environment={"HOME": str(tmp_path)})
