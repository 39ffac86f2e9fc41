"""Fixtures of the tests of the page: a browser for each module, and a server with a scripted model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.browser import browser
from support.http_server import RunningServer, running
from support.page_model import page_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser


# Not for the session: while Playwright runs, its event loop runs in the main thread, and tests of other modules
# could not start one.
@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """A browser without a window. Tests that use it skip if there is none."""
    with browser() as running_browser:
        yield running_browser


@pytest.fixture(scope="module")
def page_server() -> Iterator[RunningServer]:
    """A server of the scripted model of `support.page_model`."""
    with page_model(id="small-model") as model, running(model) as server:
        yield server
