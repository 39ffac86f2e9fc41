"""Fixtures of the tests of the page: one browser for all of them, and a server with a scripted model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.browser import browser
from support.http_server import RunningServer, running
from support.page_model import page_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def chrome() -> Iterator[Browser]:
    """A browser without a window. Tests that use it skip if there is none."""
    with browser() as running_browser:
        yield running_browser


@pytest.fixture(scope="module")
def page_server() -> Iterator[RunningServer]:
    """A server of the scripted model of `support.page_model`."""
    with page_model(id="small-model") as model, running(model) as server:
        yield server
