"""The modules of the chat page in a browser: Markdown of any shape, and streams that arrive in any pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.browser import Visit, visiting
from support.http_server import RunningServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

SHOW = """async (text) => {
    const { showMarkdown } = await import("/page/markdown.js");
    const container = document.createElement("div");
    showMarkdown(container, text);
    const outline = (node) => node.nodeType === Node.TEXT_NODE
        ? node.textContent
        : [node.localName, ...Array.from(node.childNodes, outline)];
    return Array.from(container.childNodes, outline);
}"""
# In a task of its own: a wait for the result has a limit, and a call of a script has none.
SHOW_ALL = """(texts) => { import("/page/markdown.js").then(({ showMarkdown }) => setTimeout(() => {
    for (const text of texts) showMarkdown(document.createElement("div"), text);
    window.nShown = texts.length;
})); }"""
EVENTS = """async (bytes) => {
    const { events } = await import("/page/api.js");
    const stream = new ReadableStream({ start(controller) {
        for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
        controller.close();
    } });
    const found = [];
    for await (const text of events(stream)) found.push(text);
    return found;
}"""


@pytest.fixture
def visit(chrome: Browser, page_server: RunningServer) -> Iterator[Visit]:
    with visiting(chrome, page_server.url) as visit:
        yield visit


# --- Markdown --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("## Using C#", [["h4", "Using C#"]]),
        ("## Closed ##  ", [["h4", "Closed"]]),
        ("# #", [["h3"]]),
        ("#", [["h3"]]),
        ("#no heading", [["p", "#no heading"]]),
        ("# One\r\n\r\ntwo\r\n- three\r\n", [["h3", "One"], ["p", "two"], ["ul", ["li", "three"]]]),
        ("***both***", [["p", ["strong", ["em", "both"]]]]),
        ("**bold *both***", [["p", ["strong", "bold ", ["em", "both"]]]]),
        ("***both* bold**", [["p", ["strong", ["em", "both"], " bold"]]]),
        ("**2 * 3** and **bold***", [["p", ["strong", "2 * 3"], " and ", ["strong", "bold"], "*"]]),
        ("` `` ` and `  `", [["p", ["code", "``"], " and ", ["code", "  "]]]),
    ],
)
def test_markdown_is_shown_as(visit: Visit, text: str, shown: list[object]) -> None:
    assert visit.page.evaluate(SHOW, text) == shown


def test_a_long_line_takes_no_quadratic_time(visit: Visit) -> None:
    n = 200_000
    spaces = " " * n
    texts = [
        f"# a{spaces}b",
        f"# a{'#' * n} b",
        f"# a{' #' * n} b",
        f"```{spaces}`",
        f"{'`' * n} `",
        f"{'~' * n}{spaces}`",
        f"a | b\n--- | ---{spaces}x",
        f"a | b\n{'-|' * n}x",
        f"{'* ' * n}x",
        f"{spaces}-x",
        f"> {spaces}x",
        f"` {'a' * n}`",
        "`` ` a" * (n // 20),
        "*a **b " * (n // 20),
        "[a](b" * (n // 20),
        "***" * n,
    ]
    visit.page.evaluate(SHOW_ALL, texts)
    visit.page.wait_for_function("n => window.nShown === n", arg=len(texts))


# --- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_events_may_be_cut_anywhere(visit: Visit, end: str) -> None:
    lines = ["data: ä€😀", "", ": a comment", "event: other", "data:two", "data: lines", "", "data: [DONE]", "", ""]
    found = visit.page.evaluate(EVENTS, list(end.join(lines).encode()))
    assert found == ["ä€😀", "two\nlines", "[DONE]"]


def test_an_error_after_some_text_keeps_the_text(visit: Visit) -> None:
    events = [
        {"choices": [{"delta": {"content": "So far"}}]},
        {"error": {"message": "the model failed", "code": "model_error"}},
    ]
    body = "".join(f"data: {json.dumps(each)}\r\n\r\n" for each in events)

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=body)

    visit.page.route("**/v1/chat/completions", answer)
    visit.send("hello")
    visit.page.locator(".failure").filter(has_text="The model failed.").wait_for()
    assert visit.replies() == ["So far"]
    visit.page.unroute("**/v1/chat/completions")
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.get_by_text("You said hello.").wait_for()
    assert "2 / 2" in visit.page.locator("article.assistant").inner_text()
