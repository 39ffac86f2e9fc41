"""`erllama stop`: unloads a model of a running server."""

from __future__ import annotations

import time
from pathlib import Path

import click

from erllama._runtime.printing import echo
from erllama.cli.server.running_server import RunningServer, server_options

_POLL = 0.1  # seconds


@click.command()
@click.argument("model")
@server_options
def stop(model: str, host: str, port: int, api_key_file: Path | None) -> None:
    """Unload a model of a running server. Its prompts stay in the cache, and the next request loads it again.

    MODEL is its name. Running requests finish first. Other requests for the model wait, and load it again.
    """
    server = RunningServer(host, port, api_key_file)
    status = server.post("/models/unload", {"model": model})["status"]
    if status["in_use"] or status["value"] == "loading":
        state = "in use" if status["in_use"] else "being loaded"
        echo(f"{model} is {state}, and is unloaded once its requests have ended")
        return
    while status["value"] == "unloading":
        time.sleep(_POLL)
        found = [
            each["status"] for each in server.get("/models")["data"] if model in (each["id"], *each["aliases"])
        ]
        if not found:
            break
        status = found[0]
    echo(f"{model} is {status['value']}")
