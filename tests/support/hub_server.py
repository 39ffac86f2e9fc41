"""A local server of the calls of the Hugging Face hub that downloads use, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from erllama.models.download import transfer
from support.model_stores import COMMIT, empty_home


class HubServer:
    """Serves one repository.

    Attributes:
        files: the content of each file.
        digests: the SHA-256 that the hub states, where it is not that of the content.
        cuts: for each response with content to come, after how many bytes the connection ends; used up in order.
        status, error_code: of all answers, if `status` is not 200.
        ignores_ranges: whether requests for a part get the whole file.
        requests: method, path and Range header of each request.
        tokens: the Authorization headers.
        siblings: further files that the hub lists, as they stand in its answer.
        plain: names of files that are in git itself, as small ones are, so that the hub states git's digest.
    """

    def __init__(self, files: Mapping[str, bytes], repository: str = "org/repo") -> None:
        self.files, self.repository = dict(files), repository
        self.digests: dict[str, str] = {}
        self.cuts: list[int] = []
        self.status, self.error_code = 200, ""
        self.ignores_ranges = False
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        self.siblings: list[dict[str, object]] = []
        self.plain: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def info(self) -> dict[str, object]:
        """The answer to a request for the repository's files."""
        listed = [
            {"rfilename": name, "size": len(content), **self._stated(name, content)}
            for name, content in self.files.items()
        ]
        return {"id": self.repository, "sha": COMMIT, "siblings": [*listed, *self.siblings]}

    def _stated(self, name: str, content: bytes) -> dict[str, object]:
        if name in self.plain:
            blob = hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False)
            return {"blobId": self.digests.get(name, blob.hexdigest())}
        sha256 = self.digests.get(name, hashlib.sha256(content).hexdigest())
        return {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130}}

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serve_hub(files: Mapping[str, bytes], home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Yield the server of one repository, as the endpoint of huggingface_hub; the cache, in `home`, is empty."""
    server = HubServer(files)
    empty_home(home, monkeypatch)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no token"))
    monkeypatch.setattr(transfer, "_PAUSE", 0.001)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        wanted = self.headers.get("Range")
        self.hub.requests.append(("GET", path, wanted))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.status != 200:
            self._answer(self.hub.status, b"", {"X-Error-Code": self.hub.error_code})
        elif path in (f"/api/models/{self.hub.repository}", f"/api/models/{self.hub.repository}/revision/v1"):
            self._answer(200, json.dumps(self.hub.info).encode())
        elif path.startswith(prefix := f"/{self.hub.repository}/resolve/{COMMIT}/"):
            self._send_file(self.hub.files[path.removeprefix(prefix)], wanted)
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, content: bytes, wanted: str | None) -> None:
        found = None if self.hub.ignores_ranges else re.fullmatch(r"bytes=(\d+)-", wanted or "")
        offset = int(found[1]) if found else 0
        if found and offset >= len(content):
            self._answer(416, b"")
            return
        rest = content[offset:]
        headers = {"Content-Range": f"bytes {offset}-{len(content) - 1}/{len(content)}"} if found else {}
        cut = self.hub.cuts.pop(0) if self.hub.cuts else None
        self._answer(206 if found else 200, rest if cut is None else rest[:cut], headers, len(rest))

    def _answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection = True
