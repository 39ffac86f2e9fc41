"""While a model's process is replaced, streams continue and new requests wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import erllama
from support.http_server import RunningServer, chat_body, read_until, running
from support.model_processes import model_processes
from support.threads import wait_until

OPTIONS = {"n_ctx": 4096, "n_batch": 256, "n_ubatch": 64, "n_sequences": 8}


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Path]:
    """The file that keeps the next process from loading its model."""
    path = tmp_path / "hold"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def model(tmp_path: Path, hold: Path) -> Iterator[erllama.Model]:
    with (
        erllama.Cache(disk=tmp_path / "kv", block_size=32) as cache,
        erllama.load_backend(
            "support.deadly_backend:make",
            {**OPTIONS, "slow": 0.005, "hold": str(hold)},
            id="deadly",
            cache=cache,
            process={"max_restarts": 3},
        ) as model,
    ):
        yield model
        hold.unlink(missing_ok=True)


def kill_process() -> None:
    (process,) = model_processes()
    process.kill()


def streamed_text(stream: bytes) -> str:
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_a_running_stream_continues_when_the_process_is_killed(model: erllama.Model) -> None:
    body = chat_body(max_tokens=120, temperature=0, seed=1)
    with running(model) as server:
        expected = server.post(body).json()["choices"][0]["message"]["content"]
        client = server.send({**body, "stream": True, "cache_salt": "other"})
        received = read_until(client, b'"content":"')
        kill_process()
        received += read_until(client, b"data: [DONE]")
        client.close()
    assert model.restarts == 1
    assert streamed_text(received) == expected


def test_a_request_during_a_restart_waits_for_it(model: erllama.Model, hold: Path) -> None:
    with running(model) as server, ThreadPoolExecutor(1) as threads:
        begin_restart(model, hold)
        waiting = threads.submit(server.post, chat_body(max_tokens=2))
        hold.unlink()
        assert waiting.result().status_code == 200


def begin_restart(model: erllama.Model, hold: Path) -> None:
    """End the process of a model. The next one loads the model once `hold` is removed."""
    hold.touch()
    kill_process()
    wait_until(lambda: not model.info.pid)


def test_a_restart_that_takes_too_long_is_a_503(model: erllama.Model, hold: Path) -> None:
    with running(model, restart_wait=0.2) as server:
        begin_restart(model, hold)
        answer = server.post(chat_body(max_tokens=2))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_restarting"
    assert int(answer.headers["retry-after"]) >= 1


def test_a_client_that_leaves_while_waiting_is_not_computed(model: erllama.Model, hold: Path) -> None:
    with running(model, restart_wait=600) as server:
        begin_restart(model, hold)
        server.send(chat_body("left", max_tokens=2)).close()
        wait_until(lambda: 'error="disconnected"' in scrape(server))
        hold.unlink()
        assert server.post(chat_body("stayed", max_tokens=2)).status_code == 200
        assert 'vllm:request_success_total{finished_reason="length",model_name="deadly"} 1.0' in scrape(server)


def scrape(server: RunningServer) -> str:
    from prometheus_client import generate_latest

    return generate_latest(server.state.metrics.registry).decode()


def test_a_model_that_is_given_up_is_a_503_at_once(model: erllama.Model) -> None:
    with running(model, restart_wait=600) as server:
        for _ in range(4):
            wait_until(lambda: model.info.pid or failed(model))
            if model_processes():
                kill_process()
                wait_until(lambda: not model.info.pid or failed(model))
        wait_until(lambda: failed(model))
        answer = server.post(chat_body(max_tokens=2))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_unavailable"


def failed(model: erllama.Model) -> bool:
    try:
        model._runner.check()
    except erllama.ModelFailed:
        return True
    return False


def test_others_are_answered_during_a_restart(model: erllama.Model, hold: Path) -> None:
    with running(model) as server, ThreadPoolExecutor(4) as threads:
        begin_restart(model, hold)
        waiting = [threads.submit(server.post, chat_body(f"{i}", max_tokens=2)) for i in range(4)]
        assert server.post({}, path="/nothing").status_code == 404
        hold.unlink()
        assert [each.result().status_code for each in waiting] == [200] * 4
