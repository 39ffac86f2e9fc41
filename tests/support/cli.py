"""The command `erllama` in this process or in a child process, and models with a fixed reply for it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from erllama.__main__ import main
from erllama.testing.scripted import write_scripted

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <think></think> #}"
)
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]


class CommandResult(NamedTuple):
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401
        return json.loads(self.out)


class Command:
    """Runs `erllama` in this process, with directories that belong to the test.

    Attributes:
        directory: the cache directory.
        environment: variables for child processes.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        self.directory = root / "kv"
        self.environment: Mapping[str, str] = {
            "ERLLAMA_CACHE_DIR": str(self.directory),
            "XDG_CACHE_HOME": str(root / "cache"),
            "XDG_DATA_HOME": str(root / "data"),
            "XDG_STATE_HOME": str(root / "state"),
        }
        for name, value in self.environment.items():
            patch.setenv(name, value)
        patch.delenv("ERLLAMA_DEBUG", raising=False)
        self._patch, self._captured = patch, captured

    def __call__(self, *arguments: object, stdin: str = "") -> CommandResult:
        self._patch.setattr(sys, "stdin", io.StringIO(stdin))
        self._captured.readouterr()
        status = main([str(argument) for argument in arguments])
        return CommandResult(status, *self._captured.readouterr())

    def in_subprocess(
        self, *arguments: object, stdin: bytes = b"", **more: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the command in a child process."""
        return subprocess.run(
            [sys.executable, "-m", "erllama", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            env={**os.environ, **self.environment, **more},
            timeout=120,
            check=False,
        )


def write_replying_model(path: Path, text: str, *, thinking: str = "", for_ever: bool = False) -> Path:
    """Write a model with one fixed reply and fixed thinking. No character may occur twice in either."""
    chain = ["<|assistant|>", *(["<think>", *thinking, "</think>"] if thinking else []), *text]
    follows = dict(pairwise(chain))
    if for_ever:
        follows[text[-1]] = text[0]
    return write_scripted(path, follows, special=SPECIAL, chat_template=TEMPLATE, n_ctx_train=65536)
