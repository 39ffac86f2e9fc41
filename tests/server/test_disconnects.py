"""A client that leaves, or that does not read, costs no more than the tick in progress and a bounded buffer."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

import erllama
from erllama._model.requests.streams import AsyncStream
from erllama.cache import Cache
from support.engine_models import GatedBackend
from support.http_server import CHAT, RunningServer, chat_body, read_until, running
from support.threads import wait_until

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
# Arguments that take many tokens.
LONG = {"type": "object", "properties": {"text": {"type": "string", "minLength": 300}}, "required": ["text"]}


class Cancellations:
    """Notes how many decodes had begun when a request was cancelled."""

    def __init__(self, backend: GatedBackend) -> None:
        self._backend, self.happened, self.n_decodes = backend, threading.Event(), 0

    def note(self) -> None:
        if not self.happened.is_set():
            self.n_decodes = len(self._backend.batches)
            self.happened.set()


@pytest.fixture
def backend() -> GatedBackend:
    made = GatedBackend(n_ctx=4096)
    made.metadata = {"tokenizer.chat_template": TEMPLATE}  # type: ignore[attr-defined]
    made.chat_templates = {"default": TEMPLATE}  # type: ignore[attr-defined]
    return made


@pytest.fixture
def model(backend: GatedBackend) -> Iterator[erllama.Model]:
    with Cache(block_size=32) as cache, erllama.load_backend(backend, id="gated", cache=cache) as model:
        yield model
        backend.release()


@pytest.fixture
def cancellations(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> Cancellations:
    noted, cancel = Cancellations(backend), AsyncStream.cancel

    def spy(stream: AsyncStream) -> None:
        noted.note()
        cancel(stream)

    monkeypatch.setattr(AsyncStream, "cancel", spy)
    return noted


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_within_a_tick(
    stream: bool, model: erllama.Model, backend: GatedBackend, cancellations: Cancellations
) -> None:
    with running(model) as server:
        client = server.send(chat_body(stream=stream))
        wait_until(lambda: len(backend.batches) > 3)
        backend.hold()
        client.close()
        assert cancellations.happened.wait(60)
        backend.release()
        wait_until(lambda: model.queue_depth == 0)
        # One decode was held, and one more may have begun before the gate closed.
        assert len(backend.batches) <= cancellations.n_decodes + 2


def test_a_client_that_leaves_the_queue_never_computes(model: erllama.Model, backend: GatedBackend) -> None:
    with running(model) as server:
        backend.hold()
        waiting = server.send(chat_body("first", stream=True))
        wait_until(lambda: model.queue_depth == 1)
        others = [server.send(chat_body(f"other {i}")) for i in range(8)]
        wait_until(lambda: model.queue_depth + model.pending == 9)
        for client in (waiting, *others):
            client.close()
        backend.release()
        wait_until(lambda: model.queue_depth + model.pending == 0)


def test_what_an_abandoned_request_computed_stays_cached(model: erllama.Model, backend: GatedBackend) -> None:
    prompt = "a long prompt " * 40
    with running(model) as server:
        client = server.send(chat_body(prompt, stream=True))
        wait_until(lambda: len(backend.batches) > 6)
        client.close()
        wait_until(lambda: model.queue_depth == 0)
        again = server.post(chat_body(prompt, max_tokens=1)).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 500


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(each.getMessage()) for each in caplog.records if each.name == "erllama.server.access"]


@pytest.mark.parametrize("stream", [True, False])
def test_abandoned_tokens_are_logged_and_counted(
    stream: bool, model: erllama.Model, backend: GatedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "erllama.server.access")
    with running(model) as server:
        client = server.send(chat_body(stream=stream))
        wait_until(lambda: len(backend.batches) > 6)
        client.close()
        wait_until(lambda: access_lines(caplog))
    (line,) = access_lines(caplog)
    assert line["error"] == "disconnected"
    assert line["finish_reason"] == "cancelled"
    assert line["completion_tokens"] > 1


def test_limits_of_tokens_charge_what_was_abandoned(model: erllama.Model, backend: GatedBackend) -> None:
    key = erllama.server.ApiKey(secret="k", tokens_per_minute=40)
    with running(model, keys=(key,)) as server:
        headers = {"x-api-key": "k"}
        client = server.send(chat_body(stream=True), headers=headers)
        wait_until(lambda: len(backend.batches) > 40)
        client.close()
        wait_until(lambda: server.post(chat_body(max_tokens=1), headers=headers).status_code == 429)


def test_a_reader_that_stops_is_cut_off_with_a_bounded_buffer(model: erllama.Model) -> None:
    with running(model, listen={"send_timeout": 0.5}) as server:
        client = server.send(chat_body(stream=True, n=4, logprobs=True, top_logprobs=100))
        read_until(client, b"data:")
        wait_until(lambda: not open_connections(server), 120)
        wait_until(lambda: model.queue_depth == 0)
        client.close()


def open_connections(server: RunningServer) -> list[object]:
    port = server.address[1]
    return [
        each
        for each in psutil.Process().net_connections("tcp")
        if each.laddr and each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED
    ]


def test_keep_alive_comments_arrive_while_no_token_does(model: erllama.Model, backend: GatedBackend) -> None:
    with running(model, keep_alive_seconds=0.05) as server:
        backend.hold()
        client = server.send(chat_body(stream=True, max_tokens=2))
        read_until(client, b": keep-alive\n\n")
        backend.release()
        read_until(client, b"data: [DONE]")
        client.close()


def test_keep_alive_comments_arrive_while_tool_text_is_withheld(
    model: erllama.Model, backend: GatedBackend
) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": LONG}}]
    body = chat_body(stream=True, tools=tools, tool_choice="required")
    with running(model, keep_alive_seconds=0.05) as server:
        client = server.send(body, CHAT)
        wait_until(lambda: len(backend.batches) > 10)
        backend.hold()
        received = read_until(client, b": keep-alive\n\n")
        assert b"tool_calls" not in received
        client.close()
        backend.release()
        wait_until(lambda: model.queue_depth == 0)


def test_more_connections_than_the_limit_get_a_503_until_one_ends(model: erllama.Model) -> None:
    with running(model, listen={"max_connections": 2}) as server:
        first, second = server.connect(), server.connect()
        wait_until(lambda: len(server.uvicorn.server_state.connections) == 2)
        with server.connect() as third:
            answer = read_until(third, b"as it accepts")
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert len(answer.split(b"\r\n\r\n")[1]) == int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
            assert third.recv(1) == b""
        first.close()
        wait_until(lambda: len(server.uvicorn.server_state.connections) == 1)
        assert server.post(chat_body(max_tokens=1)).status_code == 200
        second.close()


def test_a_quiet_response_repeats_an_event_and_numbers_all_events(
    model: erllama.Model, backend: GatedBackend
) -> None:
    body = {"input": "hello", "stream": True, "max_output_tokens": 2}
    with running(model, keep_alive_seconds=0.05) as server:
        backend.hold()
        client = server.send(body, "/v1/responses")
        received = b""
        while received.count(b"event: response.in_progress\n") < 3:  # the first one begins every stream
            received += client.recv(65536)
        backend.release()
        received += read_until(client, b"\r\n0\r\n\r\n")
        client.close()
    numbers = [int(number) for number in re.findall(rb'"sequence_number":(\d+)', received)]
    assert numbers == list(range(len(numbers)))
