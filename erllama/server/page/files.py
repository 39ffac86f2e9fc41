"""The page and its files: `GET /`, and `GET /page/{name}`.

The files are public, since they have nothing of the server. The page itself sends the client's key to the API.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import NamedTuple

from starlette.responses import Response

from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody
from erllama.server.replies.openai_errors import ERRORS

_MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# The page needs its own files and the API, and no other place. Text can never become script, by any function of
# the browser: the page is allowed no policy of trusted types.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # The browser keeps the files, and asks each time whether they changed: an upgrade shows at once.
    "cache-control": "no-cache",
}


class PageFile(NamedTuple):
    """A file of the page.

    Attributes:
        content: its bytes.
        media_type: for the header Content-Type.
        etag: depends on the content.
    """

    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """Return the files of the page, by name."""
    found = {}
    for entry in files(__package__).joinpath("static").iterdir():
        media_type = _MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            found[entry.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def page_endpoints() -> list[Endpoint[NoBody]]:
    """Return the endpoints of the page and its files."""
    return [
        Endpoint("GET", "/", NoBody, answer_page, ERRORS, "Return the chat page.", public=True, computes=False),
        Endpoint(
            "GET",
            "/page/{name}",
            NoBody,
            answer_file,
            ERRORS,
            "Return a file of the page.",
            public=True,
            computes=False,
        ),
    ]


async def answer_page(call: Call, body: NoBody) -> Response:
    """Answer with the page."""
    return _response(call, "index.html")


async def answer_file(call: Call, body: NoBody) -> Response:
    """Answer with a file of the page."""
    return _response(call, call.request.path_params["name"])


def _response(call: Call, name: str) -> Response:
    file = page_files().get(name)
    if file is None:
        raise ApiError("not_found", f"the page has no file {name!r:.60}", "not_found")
    headers = _HEADERS | {"etag": file.etag}
    if file.etag in call.request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
