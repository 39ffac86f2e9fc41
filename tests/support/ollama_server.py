"""Models whose replies wait, and a client of Ollama's API."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ollama

import erllama
from support.chat.scripted_model import TEMPLATE, VOCABULARY
from support.http_server import running_server
from support.scripted_backend import EOG, START, ScriptedBackend

WAIT = 120.0  # seconds; a busy machine needs some of them


class WaitingReplies:
    """A model whose replies stop in the middle until the test lets them go on.

    Args:
        before, after: the reply, up to where it waits and from there.
        seconds: how long it waits at most, before each further token; None for an error after a long time.

    Attributes:
        reached: set once a reply waits.
        released: set it to let all replies go on.
    """

    def __init__(self, before: str, after: str, *, n_ctx: int = 4096, seconds: float | None = None) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self._seconds = seconds
        self._reply, self._n_before = (before + after).encode(), len(before)
        self._backend = ScriptedBackend(VOCABULARY, self._next, chat_templates={"default": TEMPLATE}, n_ctx=n_ctx)

    def load(self) -> erllama.Model:
        return erllama.load_backend(self._backend, id="waiting", cache=erllama.Cache())

    def _next(self, tokens: list[int]) -> int:
        n = tokens[::-1].index(START) if START in tokens else 0
        if n >= self._n_before:
            self.reached.set()
            released = self.released.wait(self._seconds or WAIT)
            assert released or self._seconds is not None
        return self._reply[n] if n < len(self._reply) else EOG


@contextmanager
def ollama_client(*models: erllama.Model, **options: object) -> Iterator[ollama.Client]:
    """Serve models, and unload them afterwards."""
    try:
        with running_server(models, **options) as server, ollama.Client(server.url, timeout=WAIT) as client:
            yield client
    finally:
        for model in models:
            model.unload()
