"""A server with more models than its memory limit has room for, in all APIs.

ERLLAMA_MODEL_REQUESTS says how many requests there are; `make stress`: 2000.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import erllama
from erllama._runtime.printing import echo
from erllama.engine.backends.memory_estimate import estimate_memory
from erllama.server.models import ModelEntry, ModelPool
from support.cli import Command, write_replying_model
from support.http_server import CHAT, RunningServer, chat_body, running, serve_command
from support.threads import wait_until

N_REQUESTS = int(os.environ.get("ERLLAMA_MODEL_REQUESTS", "100"))
N_CLIENTS = 3
REPLIES = {"one": "abc", "two": "defg", "three": "hijk"}
OPTIONS = {"n_ctx": 1024, "n_threads": 1, "n_ubatch": 64}
TOO_LONG = 60_000  # tokens of a context that does not fit


def prompt_of(name: str) -> str:
    return f"{name}: " + "a long story " * 30


Ask = Callable[[httpx.Client, str], str]


def ask_openai(client: httpx.Client, name: str) -> str:
    answer = client.post("/v1/chat/completions", json=chat_body(prompt_of(name), model=name))
    return str(checked(answer)["choices"][0]["message"]["content"])


def ask_stream(client: httpx.Client, name: str) -> str:
    answer = client.post("/v1/chat/completions", json=chat_body(prompt_of(name), model=name, stream=True))
    assert answer.status_code == 200, answer.text
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def ask_responses(client: httpx.Client, name: str) -> str:
    answer = client.post("/v1/responses", json={"model": name, "input": prompt_of(name), "store": False})
    return str(checked(answer)["output"][0]["content"][0]["text"])


def ask_anthropic(client: httpx.Client, name: str) -> str:
    body = {"model": name, "max_tokens": 50, "messages": [{"role": "user", "content": prompt_of(name)}]}
    return str(checked(client.post("/v1/messages", json=body))["content"][0]["text"])


def ask_llama_server(client: httpx.Client, name: str) -> str:
    prompt = client.post("/apply-template", json=chat_body(prompt_of(name), model=name))
    body = {"model": name, "prompt": checked(prompt)["prompt"], "n_predict": 50}
    return str(checked(client.post("/completion", json=body))["content"])


def ask_ollama(client: httpx.Client, name: str) -> str:
    body = chat_body(prompt_of(name), model=name, stream=False)
    return str(checked(client.post("/api/chat", json=body))["message"]["content"])


ASKS: tuple[Ask, ...] = (ask_openai, ask_stream, ask_responses, ask_anthropic, ask_llama_server, ask_ollama)


def checked(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return the samples of a scrape by name and values of labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: write_replying_model(directory / f"{name}.gguf", text) for name, text in REPLIES.items()}


def room_for(n: int, path: Path, options: dict[str, int] = OPTIONS) -> int:
    """Return a memory limit for n models, but not for one more."""
    return round((n + 0.5) * estimate_memory(path, options).total)


@contextmanager
def server_of(files: dict[str, Path], tmp_path: Path, **options: Any) -> Iterator[RunningServer]:  # noqa: ANN401
    """Run a server of all models, and of one that is too large, with room for two."""
    entries = [ModelEntry(path=path, load="request", options=OPTIONS) for path in files.values()]
    entries.append(
        ModelEntry(path=files["one"], name="huge", load="request", options={**OPTIONS, "n_ctx": TOO_LONG})
    )
    limit = room_for(2, files["one"])
    with erllama.Cache(ram=0, disk=tmp_path / "kv", block_size=32) as cache:
        pool = ModelPool(entries, cache=cache, memory_limit=limit, memory_wait=60.0, **options)
        try:
            with running(pool) as server:
                yield server
        finally:
            pool.close()


@pytest.fixture
def server(files: dict[str, Path], tmp_path: Path) -> Iterator[RunningServer]:
    with server_of(files, tmp_path) as found:
        yield found


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as found:
        yield found


def test_requests_to_three_models_with_room_for_two_are_all_answered(server: RunningServer) -> None:
    def run_client(seed: int) -> int:
        choose, n_refused = random.Random(seed), 0
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for _ in range(N_REQUESTS // N_CLIENTS):
                if choose.random() < 0.05:
                    answer = client.post("/v1/chat/completions", json=chat_body(model="huge"))
                    assert answer.status_code == 503
                    assert "'huge' needs about" in answer.json()["error"]["message"]
                    n_refused += 1
                name = choose.choice(list(REPLIES))
                assert choose.choice(ASKS)(client, name) == REPLIES[name]
        return n_refused

    with ThreadPoolExecutor(N_CLIENTS) as clients:
        n_refused = sum(clients.map(run_client, range(N_CLIENTS)))
    found = samples(httpx.get(server.url + "/metrics", timeout=120).text)
    loads = {name: found["erllama_model_loads_total", name] for name in REPLIES}
    evictions = {name: found.get(("erllama_model_unloads_total", name, "memory"), 0) for name in REPLIES}
    echo(f"loads {loads}, unloads for others {evictions}, refused {n_refused}")
    assert sum(found["erllama_model_loaded", name] for name in REPLIES) == 2
    assert {name: loads[name] - evictions[name] for name in REPLIES} == {
        name: found["erllama_model_loaded", name] for name in REPLIES
    }
    assert sum(evictions.values()) >= 3
    assert bool(n_refused) <= found["erllama_model_load_failures_total", "huge"] <= n_refused  # some share a load
    assert ("erllama_model_loads_total", "huge") not in found or not found["erllama_model_loads_total", "huge"]
    used = sum(found["erllama_model_memory_bytes", name] for name in REPLIES)
    assert 0 < used < found["erllama_memory_limit_bytes",] * 1.2


def test_a_model_that_is_loaded_again_finds_its_prompts_on_disk(
    server: RunningServer, client: httpx.Client
) -> None:
    body = {"stream": False, "options": {"seed": 1}}
    for name in REPLIES:
        first = checked(client.post("/api/chat", json={**chat_body(prompt_of(name), model=name), **body}))
        assert first["load_duration"] > 0
    # A busy machine may not have written the blocks yet; until then, they are read from the write queue.
    assert server.state.models.cache.flush()
    for name in REPLIES:  # each was unloaded for the others
        again = checked(client.post("/api/chat", json={**chat_body(prompt_of(name), model=name), **body}))
        assert again["prompt_cached_tier"] == "disk"
        assert again["prompt_cached_count"] > again["prompt_eval_count"] - 64
        assert again["message"]["content"] == REPLIES[name]


def test_a_model_that_cannot_be_loaded_is_an_error_in_each_api(
    client: httpx.Client, files: dict[str, Path]
) -> None:
    path = files["three"]
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    try:
        for ask in ASKS:
            with pytest.raises(AssertionError, match="the model 'three' cannot be loaded"):
                ask(client, "three")
            assert ask(client, "one") == REPLIES["one"]
        listed = {each["id"]: each for each in checked(client.get("/models"))["data"]}
        assert listed["three"]["status"]["failed"]
        assert str(path.parent) not in json.dumps(listed)
    finally:
        path.write_bytes(content)
    assert ask_openai(client, "three") == REPLIES["three"]


def test_lists_describe_models_without_loading_them(client: httpx.Client) -> None:
    def read() -> tuple[dict[str, Any], ...]:
        entry = checked(client.get("/v1/models/two"))
        status = entry.pop("status")["value"]
        tags = {each["name"]: each for each in checked(client.get("/api/tags"))["models"]}
        show = checked(client.post("/api/show", json={"model": "two"}))
        props = checked(client.get("/props", params={"model": "two"}))
        assert props.pop("is_sleeping") == (status == "unloaded")
        one = checked(client.get("/v1/models/two", headers={"anthropic-version": "2023-06-01"}))
        for each in (entry, tags["two"], show, one):
            for name in ("created", "modified_at", "created_at"):
                each.pop(name, None)
        return entry, tags["two"], show, props, one

    unloaded = read()
    assert unloaded[0]["meta"]["n_ctx"] == 1024
    assert unloaded[0]["meta"]["n_params"] > 0
    assert unloaded[3]["chat_template"]
    assert checked(client.get("/v1/models"))["data"][1]["status"]["value"] == "unloaded"
    assert checked(client.get("/api/ps"))["models"] == []
    assert client.get("/slots").json() == []
    assert client.get("/health").status_code == 200
    assert client.get("/lora-adapters").json() == []
    ask_openai(client, "two")
    assert [each["name"] for each in checked(client.get("/api/ps"))["models"]] == ["two"]
    assert read() == unloaded
    slots = client.get("/slots").json()
    assert {slot["model"] for slot in slots} == {"two"}
    assert len(slots) == 4
    assert all(slot["model_memory_bytes"] > 0 for slot in slots)


def test_models_are_loaded_and_unloaded_by_request(client: httpx.Client) -> None:
    def state(name: str) -> str:
        return str(checked(client.get(f"/v1/models/{name}"))["status"]["value"])

    assert checked(client.post("/models/load", json={"model": "one"}))["success"]
    assert state("one") == "loaded"
    assert checked(client.post("/models/load", json={"model": "one"}))["success"]
    assert checked(client.post("/models/unload", json={"model": "one"}))["success"]
    wait_until(lambda: state("one") == "unloaded")
    assert checked(client.post("/models/unload", json={"model": "one"}))["success"]
    assert client.post("/models/unload", json={"model": "four"}).status_code == 404
    assert client.post("/models/load", json={"model": "huge"}).status_code == 503


def test_ollamas_keep_alive_keeps_and_unloads_a_model(client: httpx.Client) -> None:
    def chat(**body: object) -> dict[str, Any]:
        return checked(client.post("/api/chat", json={"model": "one", "stream": False, **body}))

    def expires() -> str:
        (found,) = checked(client.get("/api/ps"))["models"]
        return str(found["expires_at"])

    assert chat()["done_reason"] == "load"
    assert expires().startswith("9999-")
    chat(keep_alive="10m")
    wait_until(lambda: not expires().startswith("9999-"))
    chat(keep_alive=-1)
    assert expires().startswith("9999-")
    assert chat(keep_alive=0)["done_reason"] == "unload"
    wait_until(lambda: checked(client.get("/api/ps"))["models"] == [])
    chat(**chat_body(), keep_alive="0s")
    wait_until(lambda: checked(client.get("/api/ps"))["models"] == [])
    wrong = client.post("/api/chat", json={"model": "one", "keep_alive": "soon", **chat_body()})
    assert (wrong.status_code, "keep_alive='soon'" in wrong.json()["error"]) == (400, True)


def test_a_stream_holds_its_model_until_its_end(files: dict[str, Path], tmp_path: Path) -> None:
    endless = write_replying_model(tmp_path / "endless.gguf", "xyz", for_ever=True)
    options = {**OPTIONS, "n_ctx": 16384}  # the reply must last until the other request waits
    entries = [ModelEntry(path=path, load="request", options=options) for path in (endless, files["one"])]
    with erllama.Cache() as cache:
        pool = ModelPool(entries, cache=cache, memory_limit=room_for(1, endless, options), memory_wait=60.0)
        with running(pool) as server, ThreadPoolExecutor(1) as threads:
            with httpx.stream(
                "POST",
                server.url + "/v1/chat/completions",
                json=chat_body(model="endless", stream=True),
                timeout=120,
            ) as stream:
                lines = stream.iter_lines()
                next(lines)
                waiting = threads.submit(server.post, chat_body(model="one"))
                wait_until(lambda: pool.models[0].unload_reason == "memory")
                for _ in range(20):
                    next(lines)
                assert pool.models[0].state == "loaded"
                assert not waiting.done()
            assert waiting.result().status_code == 200  # the client has left, so the model is idle
            assert [each.state for each in pool.models] == ["unloaded", "loaded"]
        pool.close()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.delenv("ERLLAMA_API_KEY", raising=False)
    return Command(tmp_path, monkeypatch, capsys)


def test_the_command_serves_more_models_than_fit(
    tmp_path: Path, files: dict[str, Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    keys.chmod(0o600)
    arguments = [f"{name},alias-{name}={path}" for name, path in files.items()]
    limit = room_for(2, files["one"])
    options = ("--n-ctx", 1024, "--threads", 1, "--load", "n_ubatch=64", "--memory-limit", limit)
    with serve_command(tmp_path, *arguments, "--on-request", "--api-key-file", keys, *options) as server:
        port = server.url.rpartition(":")[2]
        headers = {"authorization": "Bearer secret"}
        with httpx.Client(base_url=server.url, timeout=120, headers=headers) as client:
            for name in (*REPLIES, *REPLIES):
                answer = checked(client.post("/v1/chat/completions", json=chat_body(prompt_of(name), model=name)))
                assert answer["choices"][0]["message"]["content"] == REPLIES[name]
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 300

            refused = command("ps", "--port", port)
            assert (refused.status, "a key is needed" in refused.err) == (1, True)
            shown = command("ps", "--port", port, "--api-key-file", keys)
            assert shown.status == 0
            rows = {line.split()[0]: line.split() for line in shown.out.splitlines()}
            assert (rows["one"][1], rows["two"][1], rows["three"][1]) == ("unloaded", "loaded", "loaded")
            assert "never" in rows["three"]
            monkeypatch.setenv("ERLLAMA_API_KEY", "secret")
            listed = command("ps", "--port", port, "--json").json
            assert [(each["name"], each["slots"]) for each in listed] == [("one", 0), ("two", 4), ("three", 4)]
            stopped = command("stop", "alias-three", "--port", port)
            assert (stopped.status, stopped.out) == (0, "alias-three is unloaded\n")
            unknown = command("stop", "four", "--port", port)
            assert (unknown.status, "there is no model 'four'" in unknown.err) == (1, True)
            assert [each["value"] for each in command("ps", "--port", port, "--json").json] == [
                "unloaded",
                "loaded",
                "unloaded",
            ]
        server.stop()
    chats = [line for line in server.access_lines() if line["path"] == CHAT]
    assert [line["load_seconds"] > 0 for line in chats] == [True] * 6  # type: ignore[operator]
    assert "Traceback" not in server.log.read_text()
    gone = command("ps", "--port", port)
    assert (gone.status, "no server answers" in gone.err) == (1, True)
