"""The view of the cache in a browser, accessibility in both themes, and pictures for people to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import pytest

import erllama
from erllama.server.hit_history import Counts, Interval
from support.browser import Visit, axe, screenshot, visiting
from support.chat.scripted_model import TOOLS
from support.http_server import RunningServer, running
from support.page_model import long_text, page_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.skipif(
    os.environ.get("ERLLAMA_BROWSER_TESTS") != "1", reason="takes two minutes; `make test-page` runs it"
)

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
SIZES = {"desktop": {"width": 1280, "height": 840}, "phone": {"width": 390, "height": 800}}


@pytest.fixture(scope="module")
def used_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a cache in memory and on the disk, and with requests of the last hour."""
    folder = tmp_path_factory.mktemp("kv")
    with erllama.Cache(block_size=32, ram="1MiB", disk=folder, disk_quota="2MiB") as cache:
        with page_model(cache=cache) as model, running(model) as server:
            server.post({"messages": [{"role": "user", "content": long_text()}]})
            cache.flush()
            history = server.state.history
            (latest,) = history.intervals
            history.intervals.clear()
            for minutes in range(58, 0, -1):
                n_prompt = 2000 + 700 * (minutes % 7)
                counts = Counts(1, n_prompt, n_prompt * min(60 - minutes, 50) // 51, 80)
                if minutes % 9:
                    history.intervals.append(Interval(latest.began - 60 * minutes, {model.id: counts}))
                    history.totals[model.id] = history.totals[model.id].plus(counts)
            history.intervals.append(latest)
            yield server


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with one pin."""
    pin = erllama.Pin("system-prompt", "scripted-7b", 2048, 1 << 20, None, 1.0, 2000)
    monkeypatch.setattr(erllama.Cache, "pins", lambda self: [pin])


def fill_chat(visit: Visit) -> None:
    """Let the page show all kinds of messages."""
    visit.page.get_by_role("button", name="Settings").click()
    visit.page.get_by_label("Tools, as JSON").fill(json.dumps(TOOLS))
    visit.page.get_by_role("button", name="Close").click()
    visit.ask("How does a prompt cache help?\nsample")
    visit.page.get_by_role("button", name="Regenerate").click()
    visit.page.get_by_text("2 / 2").wait_for()
    visit.wait_for_end()
    visit.ask("think")


@pytest.mark.usefixtures("pinned")
def test_the_cache_view_shows_tiers_hit_rate_pins_and_models(chrome: Browser, used_server: RunningServer) -> None:
    with visiting(chrome, used_server.url, "/#cache") as visit:
        page = visit.page
        page.get_by_role("heading", name="Tiers").wait_for()
        tiers = page.locator(".tier")
        tiers.first.wait_for()
        text = page.locator(".tiers").inner_text()
        assert "of 1.0 MiB" in text
        assert "of 2.0 MiB" in text
        assert "of prompt tokens came from the cache" in page.locator(".facts").inner_text()
        drawing = page.get_by_role("img", name="Prompt tokens from the cache over time")
        assert drawing.locator("rect.cached").count() > 30
        page.get_by_role("button", name="15 minutes").click()
        drawing.wait_for()
        assert drawing.locator("rect.cached").count() < 20
        page.get_by_text("As a table").click()
        assert page.locator("section[aria-label='Hit rate'] tbody tr").count() < 20
        assert "system-prompt" in page.locator("section[aria-label=Pins]").inner_text()
        models = page.locator("section[aria-label=Models] tbody").inner_text()
        assert "scripted-7b" in models
        assert "Loaded" in models


def test_the_cache_view_follows_the_server(chrome: Browser, page_server: RunningServer) -> None:
    with visiting(chrome, page_server.url) as visit:
        visit.page.get_by_role("combobox", name="Model").wait_for()
        visit.page.clock.install()  # before the view starts its timer
        visit.page.get_by_role("link", name="Cache").click()
        requests = visit.page.locator(".facts dd").last
        requests.wait_for()
        before = int(requests.inner_text())
        page_server.post({"messages": [{"role": "user", "content": "hello"}]})
        visit.page.clock.run_for(2500)  # longer than the view waits between two requests
        visit.page.wait_for_function(
            "n => document.querySelectorAll('.facts dd')[3].textContent === String(n)", arg=before + 1
        )
        visit.page.get_by_role("link", name="Chat").click()
        visit.page.get_by_role("textbox", name="Message").wait_for()
        n_requests = len(visit.requests)
        visit.page.clock.run_for(10_000)
        visit.page.evaluate("fetch('/page/icon.svg')")  # requests are reported in order
        assert visit.requests[n_requests:] == [f"{page_server.url}/page/icon.svg"], (
            "a view that is not shown asks for nothing"
        )


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_no_serious_fault(chrome: Browser, used_server: RunningServer, theme: Theme) -> None:
    source = axe()
    with visiting(chrome, used_server.url, color_scheme=theme, reduced_motion="reduce") as visit:
        assert visit.axe_faults(source) == [], "an empty chat"
        fill_chat(visit)
        visit.send("call")
        visit.page.get_by_label("Result of get_time").wait_for()
        visit.page.get_by_text("Thought for").click()
        assert visit.axe_faults(source) == [], "a chat"
        visit.page.get_by_role("button", name="Settings").click()
        visit.page.locator("article.user").first.get_by_role("button", name="Edit").click()
        assert visit.axe_faults(source) == [], "settings and an edit"
        visit.page.get_by_role("button", name="Keyboard shortcuts").click()
        assert visit.axe_faults(source) == [], "a dialog"
        visit.page.keyboard.press("Escape")
        visit.page.get_by_role("link", name="Cache").click()
        visit.page.locator(".tier").first.wait_for()
        visit.page.get_by_text("As a table").click()
        assert visit.axe_faults(source) == [], "the cache"
        other = "dark" if theme == "light" else "light"
        while visit.page.evaluate("document.documentElement.dataset.theme") != other:
            visit.page.get_by_role("button", name="Theme").click()
        assert visit.axe_faults(source) == [], "the theme that the button chose"


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("size", SIZES)
def test_both_views_fit_the_screen(chrome: Browser, used_server: RunningServer, theme: Theme, size: str) -> None:
    viewport = SIZES[size]
    with visiting(chrome, used_server.url, viewport=viewport, color_scheme=theme, reduced_motion="reduce") as visit:
        page = visit.page

        def take(name: str) -> None:
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= viewport["width"], f"{name} is wider than the screen"
            screenshot(visit, f"{name}-{theme}-{size}")

        page.get_by_text("Ask something").wait_for()
        take("empty")
        fill_chat(visit)
        take("chat-end")
        page.evaluate("document.getElementById('scroller').scrollTop = 0")
        take("chat")
        visit.send("call")
        page.get_by_label("Result of get_time").wait_for()
        take("tool")
        page.get_by_role("button", name="Settings").click()
        take("settings")
        page.get_by_role("button", name="Close").click()
        if size == "phone":
            page.get_by_role("button", name="Conversations", exact=True).click()
            page.get_by_role("button", name="New conversation").wait_for()
            take("conversations")
            page.keyboard.press("Escape")
        page.get_by_role("link", name="Cache").click()
        page.locator(".tier").first.wait_for()
        take("cache")
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor")
            == {
                "light": "rgb(251, 251, 249)",
                "dark": "rgb(22, 23, 24)",
            }[theme]
        )


def test_a_chosen_theme_stays_over_a_reload(chrome: Browser, page_server: RunningServer) -> None:
    with visiting(chrome, page_server.url, color_scheme="light") as visit:
        theme = visit.page.get_by_role("button", name="Theme")
        for expected in ("light", "dark"):
            theme.click()
            assert theme.get_attribute("aria-label") == f"Theme: {expected}"
        visit.page.reload()
        assert theme.get_attribute("aria-label") == "Theme: dark"
        assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 24)"
