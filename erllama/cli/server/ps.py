"""`erllama ps`: shows the models of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from erllama.cache.sizes import format_size
from erllama.cli.console import print_json, print_table
from erllama.cli.server.running_server import RunningServer, server_options

_COLUMNS = (
    ("name", "left"),
    ("state", "left"),
    ("memory", "right"),
    ("slots", "right"),
    ("waiting", "right"),
    ("unloaded in", "right"),
    ("prompt tokens", "right"),
    ("cached", "right"),
)
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@click.command()
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ps(host: str, port: int, api_key_file: Path | None, as_json: bool) -> None:
    """Show the models of a running server: their state, memory, requests and cached prompt tokens.

    Slots are the requests that run, and how many can run at once. Prompt tokens are those since the server's start.
    """
    models = RunningServer(host, port, api_key_file).get("/models").get("data", [])
    if as_json:
        print_json([{"name": each["id"], **each["status"]} for each in models])
        return
    print_table(_COLUMNS, [_row(each["id"], each["status"]) for each in models])


def _row(name: str, status: dict[str, Any]) -> tuple[str, ...]:
    state = status["value"]
    if state == "loading":
        state = f"loading {status['progress']:.0%}"
    elif state == "unloaded" and status.get("failed"):
        state = "failed"
    n_prompt = status["prompt_tokens"]
    is_loaded = status["value"] == "loaded"
    return (
        name,
        state,
        format_size(status["memory_bytes"]) if status["memory_bytes"] else "",
        f"{status['slots_in_use']}/{status['slots']}" if is_loaded else "",
        str(status["waiting"] or ""),
        _time_left(status) if is_loaded else "",
        f"{n_prompt:,}" if n_prompt else "",
        f"{status['cached_tokens'] / n_prompt:.1%}" if n_prompt else "",
    )


def _time_left(status: dict[str, Any]) -> str:
    if status["in_use"]:
        return "in use"
    seconds = status["expires_in"]
    if seconds is None:
        return "never"
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
