"""Chromium for the tests of the page: where it is, a page of a server, and a record of all that it requests.

`ERLLAMA_CHROMIUM` is the path of the browser; otherwise it is looked up on PATH. Tests skip without one, unless
`ERLLAMA_BROWSER_TESTS` is 1, as in `make test-page`: then they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--no-sandbox",  # for tests that run as root
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
AXE_VERSION = "4.14.1"
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "page"


def missing(text: str) -> None:
    """Skip the test, or fail it if the browser tests were asked for."""
    if os.environ.get("ERLLAMA_BROWSER_TESTS") == "1":
        pytest.fail(text)
    pytest.skip(text)


def chromium() -> str:
    """Return the path of the browser."""
    named = os.environ.get("ERLLAMA_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None or not Path(found).exists():
        missing(f"there is no Chromium ({named or 'on PATH'}); install one, or set ERLLAMA_CHROMIUM to its path")
    return str(found)


def axe() -> str:
    """Return the source of axe-core, which `make test-page` fetches into the user's cache directory."""
    folder = (
        os.environ.get("ERLLAMA_AXE") or Path(platformdirs.user_cache_dir()) / f"erllama/axe-core-{AXE_VERSION}"
    )
    file = Path(folder) / "package" / "axe.min.js"
    if not file.exists():
        missing(f"there is no axe-core in {folder}; run `make test-page`, which fetches it")
    return file.read_text()


@contextmanager
def browser() -> Iterator[Browser]:
    """Run a browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=list(_ARGUMENTS))
        try:
            yield running
        finally:
            running.close()


@dataclass
class Visit:
    """A page of a server, and what it did.

    Attributes:
        page: of Playwright.
        requests: the addresses that it requested.
        problems: errors of its scripts, and errors on its console.
    """

    page: Page
    url: str
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Fail if a script had an error, or if a request went to another server."""
        assert self.problems == []
        assert [each for each in self.requests if not each.startswith((self.url + "/", "blob:"))] == []

    def send(self, text: str) -> None:
        """Send a message."""
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")

    def replies(self) -> list[str]:
        """Return the texts of the replies that are shown."""
        return self.page.locator("article.assistant .text").all_inner_texts()

    def wait_for_end(self) -> None:
        """Wait until no reply is being written."""
        self.page.get_by_role("button", name="Send", exact=True).wait_for()

    def ask(self, text: str) -> str:
        """Send a message, and return the reply."""
        self.send(text)
        self.page.locator(".figures").last.wait_for()
        self.wait_for_end()
        return self.replies()[-1]

    def axe_faults(self, source: str) -> list[str]:
        """Return the serious and critical faults that axe-core finds."""
        session = self.page.context.new_cdp_session(self.page)  # its scripts do not count as the page's own
        session.send("Runtime.evaluate", {"expression": source + ";0"})
        run = "axe.run(document, {resultTypes: ['violations']}).then(found => JSON.stringify(found.violations))"
        answer = session.send("Runtime.evaluate", {"expression": run, "awaitPromise": True, "returnByValue": True})
        return [_fault(each) for each in _parsed(answer) if each["impact"] in ("serious", "critical")]


def _parsed(answer: dict[str, Any]) -> list[dict[str, Any]]:
    import json

    assert "value" in answer["result"], answer
    found: list[dict[str, Any]] = json.loads(answer["result"]["value"])
    return found


def _fault(violation: dict[str, Any]) -> str:
    nodes = [node["html"][:200] + " " + node.get("failureSummary", "")[:300] for node in violation["nodes"][:3]]
    return f"{violation['id']}: {violation['help']}: {nodes}"


@contextmanager
def visiting(browser: Browser, url: str, path: str = "/", **options: Any) -> Iterator[Visit]:  # noqa: ANN401
    """Open a page of a server. Options are those of Playwright's contexts. At the end, `Visit.check` runs."""
    context = browser.new_context(**options)
    try:
        visit = Visit(context.new_page(), url)
        context.on("request", lambda request: visit.requests.append(request.url))
        visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))

        def note(message: ConsoleMessage) -> None:
            # A status such as 401 is on the console, too. Tests of errors look at the page.
            if message.type == "error" and "Failed to load resource" not in message.text:
                visit.problems.append(message.text)

        visit.page.on("console", note)
        visit.page.set_default_timeout(60_000)
        visit.page.goto(url + path)
        yield visit
        visit.check()
    finally:
        context.close()


def screenshot(visit: Visit, name: str) -> None:
    """Write a picture of the page into build/page."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    visit.page.screenshot(path=SCREENSHOTS / f"{name}.png")
