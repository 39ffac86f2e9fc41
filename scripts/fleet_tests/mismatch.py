"""A replica with another model under the same name is not used, and an ingress with another file does not start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from typing import Any

import erllama
from scripts.fleet_tests.environment import Environment


def test_mismatch(environment: Environment) -> None:
    """Replace the model's file while the fleet runs, kill a replica, and look at what its successor does."""
    file = environment.directory / "model.gguf"
    shutil.copy(erllama.demo_model(), file)
    environment.deploy(model=str(file), replicas=2)
    assert ask(environment.port)[0] == 200
    other = bytearray(file.read_bytes())
    other[-1000] ^= 1
    replaced = environment.directory / "new.gguf"
    replaced.write_bytes(other)
    replaced.replace(file)
    before = pids(environment)
    os.kill(min(before), signal.SIGKILL)
    environment.wait_for(lambda: len(pids(environment) - before) == 1)
    answers = [ask(environment.port) for _ in range(20)]
    assert all(status == 200 for status, _ in answers), answers
    assert len({body["choices"][0]["message"]["content"] for _, body in answers}) == 1
    print("20 of 20 requests were answered by the replica with the fleet's model")
    os.kill(max(before), signal.SIGKILL)
    environment.wait_for(lambda: len(pids(environment) - before) == 2)
    status, body = ask(environment.port)
    print(f"without a replica of that model: status {status}, {body}")
    assert status == 503
    assert body["error"]["code"] == "model_unavailable"


def pids(environment: Environment) -> set[int]:
    """Return the processes of the running replicas."""
    return {each.pid for each in environment.replicas().values()}


def ask(port: int) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of a short chat."""
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    asked = {"model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
