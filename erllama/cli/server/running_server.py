"""Speaks to a running server, for `erllama ps` and `erllama stop`."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from erllama.cli.options import FILE
from erllama.errors import Error
from erllama.server.conduct.key_files import VARIABLE, read_key_file, read_key_variable
from erllama.server.settings.listening import ListenOptions

Command = TypeVar("Command", bound=Callable[..., object])

_TIMEOUT = 60.0  # seconds


class RunningServer:
    """A server at an address.

    Args:
        host, port: where it listens.
        key_file: file with a key; None to take the key of the environment, if there is one.
    """

    def __init__(self, host: str, port: int, key_file: Path | None) -> None:
        self._host, self._port = host, port
        keys = read_key_file(key_file) if key_file is not None else read_key_variable()
        self._headers = {"content-type": "application/json"}
        if keys:
            self._headers["authorization"] = f"Bearer {keys[0].secret}"

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON of a path; errors as for `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: object) -> dict[str, Any]:
        """Send JSON to a path, and return the JSON of the answer.

        Raises:
            Error: no server answers, or it refuses the request.
        """
        return self._request("POST", path, json.dumps(body).encode())

    def _request(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        where = f"{self._host}, port {self._port}"
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT)
        try:
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Error(f"no server answers on {where}: {error}; start one, or pass --host and --port") from None
        finally:
            connection.close()
        try:
            values = json.loads(content)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise Error(f"the server on {where} is not erllama: it answers {path} with status {answer.status}")
        if answer.status != 200:
            error_values = values.get("error")
            message = error_values.get("message") if isinstance(error_values, dict) else None
            raise Error(f"the server on {where} refuses: {message or answer.status}")
        return values


def server_options(command: Command) -> Command:
    """Add the options that say which server is meant: `host`, `port` and `api_key_file`."""
    defaults = ListenOptions()
    for option in (
        click.option(
            "--api-key-file",
            type=FILE,
            metavar="FILE",
            help=f"File whose first key is sent. The variable {VARIABLE} may hold a key, too.",
        ),
        click.option(
            "--port",
            type=click.IntRange(1, 65535),
            default=defaults.port,
            metavar="N",
            help="Port of the server.",
        ),
        click.option("--host", default=defaults.host, metavar="ADDRESS", help="Address of the server."),
    ):
        command = option(command)
    return command
