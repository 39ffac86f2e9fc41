"""The chat page with a keyboard and a screen reader: shortcuts, input methods, focus, and what is announced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.browser import Visit, visiting
from support.chat.scripted_model import TOOLS
from support.http_server import RunningServer
from support.page_model import SAMPLE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route


@pytest.fixture
def visit(chrome: Browser, page_server: RunningServer) -> Iterator[Visit]:
    with visiting(chrome, page_server.url) as visit:
        yield visit


def focused(visit: Visit) -> str:
    """Return the id of the element with the focus."""
    found: str = visit.page.evaluate("document.activeElement.id")
    return found


def test_the_page_is_used_with_the_keyboard_alone(visit: Visit) -> None:
    page = visit.page

    def focused() -> str:
        name: str = page.evaluate(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
        )
        return name

    page.get_by_role("combobox", name="Model").wait_for()
    assert focused() == "Message"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.get_by_text("You said one").wait_for()
    visit.wait_for_end()
    assert focused() == "Message"
    page.keyboard.press("ArrowUp")
    assert focused() == "Edit the message"
    page.keyboard.press("Escape")
    assert focused() == "Edit"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Alt+r")
    page.get_by_text("2 / 2").wait_for()
    visit.wait_for_end()
    page.keyboard.press("Alt+v")
    page.get_by_role("heading", name="Tiers").wait_for()
    page.keyboard.press("Alt+v")
    page.keyboard.press("Alt+s")
    assert page.evaluate("document.activeElement.id") == "setting-system"
    page.keyboard.press("Alt+s")
    assert focused() == "Settings"
    page.keyboard.press("Alt+n")
    assert focused() == "Message"
    assert visit.replies() == []
    names = [focused()]
    while len(names) < 30 and names[-1] != "Skip to the message field":
        page.keyboard.press("Shift+Tab")
        names.append(focused())
    expected = ["Skip to the message field", "Chat", "Cache", "Model", "Settings", "Theme: system"]
    assert names[::-1][: len(expected)] == expected
    page.keyboard.press("Enter")
    assert focused() == "Message"


def test_the_status_is_announced_once_and_not_for_each_token(visit: Visit) -> None:
    visit.page.evaluate(
        """() => { window.changes = []; const status = document.getElementById("status");
        new MutationObserver(() => window.changes.push(status.textContent)).observe(status, {childList: true}); }"""
    )
    visit.ask("sample")
    assert visit.page.evaluate("window.changes") == [
        "Waiting for the first token…",
        "Writing…",
        f"Reply complete, {len(SAMPLE.encode()):,} tokens.",
    ]
    assert visit.page.locator("#messages [aria-live], [role=log]").count() == 0
    assert visit.page.locator("[aria-busy]").count() == 0


# --- keys ------------------------------------------------------------------------------------------


def test_an_enter_of_an_input_method_does_not_send(visit: Visit) -> None:
    visit.ask("one")
    press = """(key) => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", { key, keyCode: 229, bubbles: true, cancelable: true }))"""
    message = visit.page.get_by_role("textbox", name="Message")
    message.fill("two")
    visit.page.evaluate(press, "Enter")
    assert message.input_value() == "two"
    visit.page.get_by_role("button", name="Edit").click()
    field = visit.page.get_by_role("textbox", name="Edit the message")
    for key in ("Enter", "Escape"):
        visit.page.evaluate(press, key)
        assert field.is_visible()
    assert visit.page.locator(".bubble").count() == 0, "the only message is being edited"


def test_option_and_a_letter_is_no_shortcut_in_a_field_on_macos(visit: Visit) -> None:
    visit.ask("one")
    visit.page.evaluate("Object.defineProperty(navigator, 'platform', { get: () => 'MacIntel' })")
    visit.page.get_by_role("textbox", name="Message").focus()
    visit.page.keyboard.press("Alt+n")
    assert visit.replies() == ["You said one."]
    visit.page.locator("#scroller").focus()
    visit.page.keyboard.press("Alt+n")
    assert visit.replies() == []


def test_shortcuts_of_the_chat_do_nothing_in_the_view_of_the_cache(visit: Visit) -> None:
    visit.ask("one")
    visit.page.keyboard.press("Alt+v")
    visit.page.get_by_role("heading", name="Tiers").wait_for()
    visit.page.keyboard.press("Alt+r")
    visit.page.keyboard.press("Alt+s")
    assert not visit.page.locator("#settings").is_visible()
    visit.page.keyboard.press("Alt+v")
    visit.page.get_by_role("button", name="Send", exact=True).wait_for()
    assert visit.replies() == ["You said one."]
    assert visit.page.get_by_text("2 / 2").count() == 0


# --- focus and status --------------------------------------------------------------------------------


def test_escape_closes_the_narrow_sidebar_and_returns_the_focus(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 390, "height": 800})
    visit.page.get_by_role("button", name="Conversations", exact=True).click()
    visit.page.get_by_role("button", name="New conversation").focus()
    visit.page.keyboard.press("Escape")
    assert focused(visit) == "menu"


@pytest.mark.parametrize(("typed", "expected"), [("", "result-0"), ("more", "message")])
def test_a_tool_call_takes_the_focus_unless_someone_types(visit: Visit, typed: str, expected: str) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    visit.page.get_by_role("button", name="Settings").click()
    visit.page.get_by_label("Tools, as JSON").fill(json.dumps(TOOLS))
    visit.page.get_by_role("button", name="Close").click()
    visit.page.route("**/v1/chat/completions", hold)
    visit.send("call")
    visit.page.get_by_role("button", name="Stop").wait_for()
    if typed:
        visit.page.keyboard.type(typed)
    while not held:
        visit.page.wait_for_timeout(10)
    held[0].continue_()
    visit.page.get_by_label("Result of get_time").wait_for()
    assert focused(visit) == expected


def test_a_reply_of_another_conversation_is_not_announced(visit: Visit) -> None:
    visit.send("for ever")
    visit.page.locator("article.assistant .text").filter(has_text="word word").wait_for()
    visit.page.get_by_role("button", name="New conversation").click()
    visit.page.wait_for_timeout(300)  # some tens of tokens
    status = visit.page.locator("#status")
    assert status.inner_text() == ""
    visit.page.locator("#conversations .open").click()
    status.filter(has_text="Writing…").wait_for()
    visit.page.get_by_role("button", name="Stop").click()
    status.filter(has_text="Stopped.").wait_for()
