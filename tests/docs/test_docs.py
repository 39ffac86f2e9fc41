"""The snippets of the pages run, one after another, and do what the pages say.

Those that take a model of the reader's, and nothing else, run with the examples; those of backends and metrics
where these are tested; programs that a page has saved, with its commands.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import json
import os
import re
import sys
import time
import unittest
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

import erllama
from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama.cache import Block, Cache, FileTier
from erllama.cache.blocks.key_file import create_key_file
from erllama.cache.tiers.key_state import is_encrypted
from erllama.chat.tool_calls.formats import TOOL_FORMATS
from erllama.engine import SamplingOptions
from erllama.engine.backends.stub import StubBackend
from erllama.events.options import DEFAULT_ADDRESS, KvEvents
from erllama.llama_cpp import Llama
from erllama.llama_cpp.llama_chat_format import CHAT_FORMATS
from erllama.llama_cpp.loading import LEGACY
from erllama.testing import TierConformance
from erllama.testing.models import write_llama
from erllama.testing.scripted import write_scripted
from support.chat.scripted_model import CALL, TEMPLATE, TOOLS, model_replying, user
from support.doc_pages import DOCS, NAMES, SCRIPTS, blocks
from support.event_subscriber import free_address, namespace_of, stored_in, subscribed
from support.hub_server import HubServer
from support.model_stores import OllamaStore, empty_home
from support.paths import ROOT

sys.path.append(str(ROOT))

from scripts.llama_cpp_python_tests.exceptions import EXCEPTIONS

Names = dict[str, Any]


class ClosingStub(StubBackend):
    """A stub that prefers the characters that close JSON and calls, and makes a call for a prompt that is empty
    but for one byte.
    """

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        logits = super()._logits(sequence)
        logits[list(b'",]}()')] += 100
        at = self._lengths[sequence] - 1
        logits[list(b"<call>"[at : at + 1])] += 200
        return logits


class Model:
    """The `model` of a page. Forwards prompts and records the replies."""

    def __init__(self, inner: erllama.Model) -> None:
        self._inner = inner
        self.replies: list[erllama.Completion] = []

    def complete(self, prompt: Any, **options: Any) -> erllama.Completion:  # noqa: ANN401
        self.replies.append(self._inner.complete(prompt, **options))
        return self.replies[-1]


def snippets(page: str) -> list[str]:
    """Return the Python blocks of the page, each padded with empty lines so that line numbers match the page."""
    return ["\n" * (block.line - 1) + block.text for block in blocks(page, "python")]


def stated_value(source: str, statement: ast.stmt) -> tuple[object] | None:
    """Return the value that a comment after an expression states, as in `f(x)  # True`."""
    line = source.splitlines()[(statement.end_lineno or 1) - 1]
    comment = line.encode()[statement.end_col_offset :].decode().strip()
    if not isinstance(statement, ast.Expr) or not comment.startswith("#"):
        return None
    try:
        return (ast.literal_eval(comment.lstrip("# ")),)
    except (SyntaxError, ValueError):
        return None  # a comment in words


def run(page: str, names: Names) -> int:
    """Run the snippets of the page with some names defined. Returns how many stated values were right."""
    n_kept = 0
    for source in snippets(page):
        for statement in ast.parse(source, page).body:
            value = stated_value(source, statement)
            if value is not None and isinstance(statement, ast.Expr):
                found = eval(compile(ast.Expression(statement.value), page, "eval"), names)
                assert found == value[0], f"{page}, line {statement.lineno}: {found!r}"
                n_kept += 1
            else:
                exec(compile(ast.Module([statement], []), page, "exec", dont_inherit=True), names)
    return n_kept


class Page(NamedTuple):
    """The set-up and the checks of a page.

    Attributes:
        names: names that its snippets assume, besides `model` and `erllama`.
        check: checks the names afterwards, including those that the page defines.
        n_promises: number of comments that state a value.
    """

    backend: Callable[[], StubBackend]
    names: Names
    check: Callable[[Names], None]
    n_promises: int = 0


def sampling_page(names: Names) -> None:
    whole = names["model"].complete(names["prompt"], max_tokens=200, seed=1)
    assert names["first"].tokens + names["more"].tokens == whole.tokens
    first, without_digits, *_ = names["model"].replies
    assert (first.seed, len(first.tokens)) == (1, 200)
    assert len(without_digits.tokens) > 100
    assert not set(without_digits.tokens) & set(b"0123456789")


def grammar_page(names: Names) -> None:
    weather, date, answer, call = names["model"].replies
    jsonschema.validate(json.loads(weather.text), names["schema"])
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date.text)
    assert answer.text in ("yes", "no")
    assert re.fullmatch(r"<call>[a-z]+\([0-9]*\)</call>", call.text)


IS_DIGIT = np.isin(np.arange(257), list(b"0123456789"))
PAGES = {
    "docs/sampling.md": Page(
        lambda: StubBackend(n_ctx=512, eog_bias=-100),
        {"prompt": "Count: ", "is_digit": IS_DIGIT},
        sampling_page,
    ),
    "docs/grammar.md": Page(lambda: ClosingStub(n_ctx=512), {"json": json, "prompt": "x"}, grammar_page, 4),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run_as_written(page: str) -> None:
    of_page = PAGES[page]
    assert len(snippets(page)) >= 3
    with erllama.Cache() as cache, erllama.load_backend(of_page.backend(), cache=cache) as model:
        names = {"model": Model(model), "erllama": erllama, **of_page.names}
        assert run(page, names) == of_page.n_promises
        of_page.check(names)


def test_the_chat_page_runs_as_written() -> None:
    with model_replying(f"<think>hm</think>Well. {CALL}") as model:
        names: Names = {
            "model": model,
            "erllama": erllama,
            "tools": TOOLS,
            "key": b"k",
            "run": lambda name, given: "noon",
        }
        run("docs/chat.md", names)
        assert names["reply"].tool_calls[0].arguments == {"city": "Oslo"}
        assert [message["role"] for message in names["messages"]].count("tool") == 1


def test_the_chat_page_names_every_option_and_format() -> None:
    page = (DOCS / "chat.md").read_text()
    assert set(TOOL_FORMATS) <= set(re.findall(r"`([\w.-]+)`", page))
    own = set(ChatOptions.__annotations__) - set(CompletionOptions.__annotations__) | {
        name for name in CompletionOptions.__annotations__ if name.startswith(("thinking", "tool_"))
    }
    assert own <= set(re.findall(r"\b(\w+)\b", page))


def test_the_llama_cpp_python_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("erllama._model.default_cache._default_cache", None)
    installed = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "llama_cpp"}
    write_scripted(tmp_path / "model.gguf", {"a": "b", "b": "c", "c": "a"}, chat_template=TEMPLATE)
    names: Names = {}
    try:
        assert run("docs/llama-cpp-python.md", names) == 1
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
            monkeypatch.delitem(sys.modules, name)
        sys.modules.update(installed)
        gc.collect()  # the page drops its first model
    assert names["disk"].cache_size >= 0
    assert list((tmp_path / "kv").rglob("index.db"))
    wait_until_unloaded()


def wait_until_unloaded() -> None:
    deadline = time.monotonic() + 60
    while erllama.list_models() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_llama_cpp_python_page_names_every_option_and_format() -> None:
    page = (DOCS / "llama-cpp-python.md").read_text()
    parameters = inspect.signature(Llama.__init__).parameters
    options = set(parameters) - {"self", "kwargs"} | set(LEGACY) | set(CHAT_FORMATS)
    assert options <= set(re.findall(r"`([\w.-]+)[`=]", page))
    assert set(EXCEPTIONS) <= set(re.findall(r"`(\w+)`", page))


def test_the_templates_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    names: Names = {"messages": [user("Q")], "tools": TOOLS}
    run("docs/templates.md", names)
    assert "<|user|>Q" in names["text"]


def test_the_speculation_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follows = {"\n": "a", "a": "b", "b": "c", "c": "a"}
    with erllama.load_model(write_scripted(tmp_path / "small.gguf", follows), n_ctx=256, n_threads=1) as model:
        names: Names = {"model": model, "erllama": erllama, "text": "abc" * 20, "prompt": "abc" * 20}
        run("docs/speculation.md", names)
        names["draft"].unload()
        assert names["reply"].drafts.accepted > 0
        assert names["found"].accepted == 5


def test_the_processes_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("erllama.cache.options.default_directory", lambda name: tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    write_scripted(tmp_path / "model.gguf", {"a": "b"})
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "backend.py").write_text(
        "from erllama.engine.backends.stub import StubBackend\nmake = StubBackend\n"
    )
    names: Names = {"erllama": erllama}
    run("docs/processes.md", names)
    models = [names["model"], names["custom"]]
    assert len({os.getpid(), *(model.info.pid for model in models)}) == 3
    for model in models:
        model.unload()


def test_the_sampling_page_names_every_option_and_its_default() -> None:
    page = (DOCS / "sampling.md").read_text()
    defaults = {field.name: field.default for field in fields(SamplingOptions)}
    assert set(defaults) <= set(re.findall(r"`(\w+)[`=]", page))
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    listed = {name: ast.literal_eval(value) for row in rows for name, value in re.findall(r"`(\w+)=([^`]*)`", row)}
    assert listed.pop("logit_bias") == (defaults.pop("logit_bias") or {})
    elsewhere = {"seed", "samplers", "min_keep", "mirostat", "mirostat_tau", "mirostat_eta"}
    assert listed == {name: default for name, default in defaults.items() if name not in elsewhere}


def test_the_readme_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    calling = TEMPLATE + "{# <tool_call> #}"
    write_scripted(tmp_path / "model.gguf", {"\n": "a", "a": "b", "b": "c", "c": "a"}, chat_template=calling)
    names: Names = {"tools": TOOLS, "SYSTEM_PROMPT": "abc" * 20, "asyncio": asyncio}
    run("README.md", names)
    replies = asyncio.run(names["ask_all"](["a", "b", "c"]))
    assert len(replies) == 3
    assert all(replies)
    assert [message["role"] for message in names["messages"]] == ["user", "assistant"]
    names["cache"].close()
    assert list((tmp_path / ".cache" / "erllama").rglob("*.kvc"))


def test_the_encryption_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_scripted(tmp_path / "model.gguf", {"a": "b", "b": "c", "c": "a"})
    create_key_file(tmp_path / ".config" / "erllama" / "cache.key")
    names: Names = {"erllama": erllama}
    run("docs/encryption.md", names)
    with names["cache"], names["model"] as model:
        model.complete("abc" * 100, max_tokens=4)
    assert list((tmp_path / ".cache" / "private").rglob("*.kvc"))
    assert is_encrypted(tmp_path / ".cache" / "private")


def test_the_events_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At another address, because another program may use the one of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_scripted(tmp_path / "model.gguf", {"a": "b", "b": "c", "c": "a"})
    written: list[erllama.KvEvents] = []

    def elsewhere(*arguments: Any, **options: Any) -> erllama.KvEvents:  # noqa: ANN401
        written.append(KvEvents(*arguments, **options))
        return replace(written[0], address=free_address())

    monkeypatch.setattr(erllama, "KvEvents", elsewhere)
    names: Names = {}
    run("docs/fleet/events.md", names)
    assert written[0].address == DEFAULT_ADDRESS
    with names["cache"] as cache, names["model"] as model, subscribed(names["events"].address) as subscriber:
        model.complete("abc" * 200, max_tokens=4)
        assert cache.flush()
        subscriber.wait_for(stored_in(cache, namespace_of(model), written[0].block_size))
        assert subscriber.known


def test_the_remote_tier_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a directory as the bucket."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    create_key_file(tmp_path / "key")
    written: list[Names] = []

    def elsewhere(**options: Any) -> erllama.Cache:  # noqa: ANN401
        written.append(options)
        return Cache(**{**options, "remote": tmp_path / "bucket", "remote_key_file": tmp_path / "key"})

    monkeypatch.setattr(erllama, "Cache", elsewhere)
    names: Names = {}
    run("docs/fleet/remote-tier.md", names)
    assert written[0]["remote"] == "s3://bucket/prefix"
    assert str(written[0]["remote_key_file"]).endswith(".key")
    with names["cache"] as cache, erllama.load_backend(StubBackend(), cache=cache) as model:
        model.complete("a prompt " * 100, max_tokens=4)
        assert cache.flush()
    assert any(path.is_file() for path in (tmp_path / "bucket").rglob("*"))
    assert list((tmp_path / ".cache").rglob("*.kvc"))


def test_the_memory_pressure_page_runs_as_written() -> None:
    names: Names = {"erllama": erllama, "batch_bytes": lambda: 2**30}
    run("docs/memory-pressure.md", names)
    assert names["budget"]().total == 64 * 2**30
    names["cache"].close()


class Bucket:
    """An object store, in memory."""

    def __init__(self) -> None:
        self.held: dict[bytes, tuple[Block, bytes]] = {}

    def listing(self) -> list[tuple[Block, int, int]]:
        return [(block, len(payload), 0) for block, payload in self.held.values()]

    def put(self, block: Block, payload: bytes) -> None:
        self.held[block.key] = (block, payload)

    def get(self, key: bytes) -> tuple[Block, bytes]:
        if key not in self.held:
            raise FileNotFoundError(key.hex())
        return self.held[key]

    def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.held.pop(key, None)


def test_the_tiers_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names: Names = {"bucket": Bucket()}
    run("docs/tiers.md", names)
    prompt = "a prompt " * 100
    with names["cache"] as cache, erllama.load_backend(StubBackend(), cache=cache) as model:
        model.complete(prompt, max_tokens=4)
        cache.flush()
    assert names["bucket"].held
    with erllama.Cache(ram=0, tiers=[names["ObjectStore"](names["bucket"], budget=10**9)]) as cache:
        with erllama.load_backend(StubBackend(), cache=cache) as model:
            hit = model.complete(prompt, max_tokens=4).cache
    assert (hit.kind, hit.tier) == ("exact", "remote")


def test_the_models_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama's store has a small model, and a local server is the hub."""
    content = write_llama(tmp_path / "tiny.gguf").read_bytes()
    empty_home(tmp_path / "home", monkeypatch)
    OllamaStore(tmp_path / "home" / ".ollama" / "models").add("registry.ollama.ai/library/llama3.2/3b", content)
    hub = HubServer({"repo-Q4_K_M.gguf": content})
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        names: Names = {}
        run("docs/models.md", names)
        assert names["fit"].fits
        assert names["path"].name == "repo-Q4_K_M.gguf"
    finally:
        hub.close()


def test_the_harness_page_runs_as_written(tmp_path: Path) -> None:
    """Run its state machines briefly."""
    tested = ("MyTier", "MyTier", "MyBackend")
    for source, tier_or_backend in zip(snippets("docs/test-harness.md"), tested, strict=True):
        names: Names = {
            "MyTier": lambda directory, budget: FileTier(directory / "mine", budget, name="mine"),
            "MyBackend": lambda path: StubBackend(),
            "__name__": "page",
        }
        assert tier_or_backend in source
        exec(compile(source, "docs/test-harness.md", "exec", dont_inherit=True), names)
        case = names["TestMine"]
        if issubclass(case, TierConformance):
            for name in (name for name in dir(case) if name.startswith("test_")):
                with suppress(unittest.SkipTest):
                    getattr(case(), name)()
            continue
        case.settings = settings(max_examples=3, stateful_step_count=10, deadline=None)
        result = unittest.TestResult()
        case("runTest").run(result)
        assert result.wasSuccessful(), result.failures + result.errors


# Pages whose snippets other tests run.
ELSEWHERE = {
    "docs/llm.md": "tests/cli/test_llm_plugin.py",
    "docs/backends.md": "tests/harness/test_backends.py",
    "docs/cli.md": "tests/cli/test_chat_commands.py",
    "docs/metrics.md": "tests/serving/test_metrics.py",
    "docs/demo-model.md": "tests/models/test_demo_model.py",
    "docs/index.md": "tests/docs/test_commands.py",
    "docs/server/ollama.md": "tests/server/test_ollama.py",
    **{f"docs/{page}.md": "tests/docs/test_examples.py" for page in SCRIPTS},
    **{
        f"docs/server/clients/{page}.md": "tests/server/test_client_pages.py"
        for page in ("langchain", "litellm", "llamaindex", "pydantic-ai")
    },
    "docs/server/anthropic.md": "tests/server/test_anthropic_docs.py",
    "docs/server/llama-server.md": "tests/server/test_llama_server_docs.py",
    "docs/server/openai.md": "tests/server/test_openai_docs.py",
    "docs/server/responses.md": "tests/server/test_responses_docs.py",
}


def test_every_page_with_snippets_is_run_somewhere() -> None:
    here = set(re.findall(r"\"((?:docs/)?[\w/-]+\.md)\"", Path(__file__).read_text()))
    for page in NAMES:
        if blocks(page, "python"):
            assert page in here or page in ELSEWHERE, f"no test runs the snippets of {page}"
    for page, test in ELSEWHERE.items():
        assert page not in NAMES or (blocks(page, "python") and (ROOT / test).exists()), page


def test_a_wrong_snippet_is_reported_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.doc_pages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text("# A page\n\n```python\nx = 1  # True\nx + 1  # words\nx + 2  # 3\n```\n")
    assert run("page.md", {}) == 1
    (tmp_path / "page.md").write_text("# A page\n\n```python\nx = 1\nx + 2  # 4\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 5: 3"):
        run("page.md", {})
