"""The page that people open in a browser: a chat, and a view of the cache. Also the status that feeds the view.

`endpoints` has the status, which is part of the API. `page_endpoints` has the page and its files.
"""

from __future__ import annotations

from erllama.server.endpoints import Endpoint, NoBody
from erllama.server.page.files import page_endpoints
from erllama.server.page.status import endpoints as status_endpoints

__all__ = ["endpoints", "page_endpoints"]


def endpoints() -> list[Endpoint[NoBody]]:
    """Return the endpoints of the API."""
    return status_endpoints()
