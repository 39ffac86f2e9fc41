"""Calls the application of a server with the forms of llama-server's endpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

import erllama
import erllama.server
from erllama.server import ServedModel


@contextmanager
def client_of(*models: erllama.Model | ServedModel, **options: object) -> Iterator[TestClient]:
    """Yield a client of a server of these models, in this process."""
    with TestClient(erllama.server.app(models, **options), base_url="http://localhost") as client:
        yield client


def post(client: TestClient, path: str, **body: object) -> Any:  # noqa: ANN401
    """Return the JSON of a successful answer."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str, **body: object) -> dict[str, Any]:
    """Return the error of a refused request. Its code is the status."""
    answer = client.post(path, json=body)
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == answer.status_code
    return error


def events(client: TestClient, path: str, **body: object) -> list[dict[str, Any]]:
    """Return the events of a stream."""
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines]
