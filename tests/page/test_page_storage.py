"""What the chat page stores: changes by two tabs at once, and a storage that is full."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from support.browser import Visit, visiting
from support.http_server import RunningServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Leaves room for some thousand characters.
FILL = """(room) => {
    let filler = "";
    for (let size = 1 << 22; size >= 1; size >>= 1) {
        try {
            localStorage.setItem("filler", filler + "x".repeat(size));
            filler += "x".repeat(size);
        } catch {
            // This much is too much.
        }
    }
    localStorage.setItem("filler", filler.slice(room));
}"""


@pytest.fixture
def visit(chrome: Browser, page_server: RunningServer) -> Iterator[Visit]:
    with visiting(chrome, page_server.url) as visit:
        yield visit


def second_tab(first: Visit) -> Visit:
    """Open the page once more, with the same storage."""
    second = Visit(first.page.context.new_page(), first.url, problems=first.problems)
    second.page.on("pageerror", lambda error: first.problems.append(str(error)))
    second.page.goto(first.url)
    second.page.get_by_role("combobox", name="Model").wait_for()
    return second


def messages(visit: Visit) -> list[str]:
    """Return the texts of the messages of the person that are shown."""
    return visit.page.locator(".bubble").all_inner_texts()


def titles(visit: Visit) -> list[str]:
    return visit.page.locator("#conversations .open").all_inner_texts()


def delete(visit: Visit) -> None:
    """Delete the last conversation of the list."""
    visit.page.locator("#conversations .more").last.click()
    visit.page.get_by_role("button", name="Delete", exact=True).click()
    visit.page.get_by_role("button", name="Delete for good").click()


# --- two tabs ----------------------------------------------------------------------------------------


def test_open_settings_follow_those_of_another_tab(visit: Visit) -> None:
    visit.ask("one")
    other = second_tab(visit)
    for each in (visit, other):
        each.page.get_by_role("button", name="Settings").click()
    system = visit.page.get_by_label("System prompt")
    system.fill("Be brief.")
    temperature = other.page.get_by_label("Temperature")
    temperature.fill("0.5")
    temperature.blur()
    visit.page.wait_for_function("() => document.getElementById('setting-temperature').value === '0.5'")
    assert system.input_value() == "Be brief.", "the field in which someone types"
    system.blur()
    top_p = visit.page.get_by_label("Top p")
    top_p.fill("0.9")
    top_p.blur()
    with visit.page.expect_request("**/v1/chat/completions") as request:
        visit.ask("two")
    body: dict[str, Any] = json.loads(request.value.post_data or "")
    assert (body["temperature"], body["top_p"]) == (0.5, 0.9)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_replies_of_two_tabs_in_one_conversation_are_both_stored(visit: Visit) -> None:
    visit.send("for ever")
    visit.page.get_by_text("word word").wait_for()
    other = second_tab(visit)
    assert messages(other) == ["for ever"]
    other.send("two")
    other.page.locator("article.assistant").nth(1).wait_for()
    visit.page.get_by_role("button", name="Stop").click()
    visit.wait_for_end()
    other.page.get_by_text("You said two.").wait_for()
    other.wait_for_end()
    for each in (visit, other):
        each.page.reload()
        each.page.get_by_text("You said two.").wait_for()
        assert messages(each) == ["for ever", "two"]
        assert "word word" in each.replies()[0]


def test_what_a_tab_overwrote_unseen_is_stored_again_by_the_other(visit: Visit) -> None:
    visit.ask("one")
    before = visit.page.evaluate("() => Object.entries(localStorage)")
    other = second_tab(visit)
    other.ask("two")
    # Browsers do not order the changes of two tabs: this one writes what it read before the other's.
    visit.page.evaluate("(entries) => entries.forEach(([key, value]) => localStorage.setItem(key, value))", before)
    visit.page.wait_for_function("() => Object.values(localStorage).some((each) => each.includes('You said two.'))")
    visit.page.reload()
    visit.page.get_by_text("You said two.").wait_for()
    assert messages(visit) == ["one", "two"]


def test_an_edit_keeps_what_another_tab_added_meanwhile(visit: Visit) -> None:
    visit.ask("one")
    other = second_tab(visit)
    visit.page.get_by_role("button", name="Edit").click()
    other.ask("two")
    field = visit.page.get_by_role("textbox", name="Edit the message")
    field.fill("three")
    field.press("Enter")
    visit.page.get_by_text("You said three.").wait_for()
    visit.wait_for_end()
    visit.page.reload()
    visit.page.get_by_text("You said three.").wait_for()
    visit.page.get_by_role("button", name="Previous version").click()
    assert messages(visit) == ["one", "two"]
    assert visit.replies() == ["You said one.", "You said two."]


def test_a_conversation_that_another_tab_deleted_is_not_stored_again(visit: Visit) -> None:
    visit.send("for ever")
    visit.page.get_by_text("word word").wait_for()
    other = second_tab(visit)
    delete(other)
    visit.page.get_by_text("Another tab deleted this conversation.").wait_for()
    assert titles(visit) == titles(other) == []
    assert visit.replies() == []
    for each in (visit, other):
        each.page.reload()
        each.page.get_by_role("combobox", name="Model").wait_for()
        assert titles(each) == []


# --- a full storage ----------------------------------------------------------------------------------


def test_the_warning_about_full_storage_stays_until_all_is_stored(visit: Visit) -> None:
    visit.page.evaluate(FILL, 20_000)
    warning = visit.page.get_by_role("alert").filter(has_text="no more room")
    visit.send("x" * 30_000)
    visit.page.locator(".failure").wait_for()
    warning.wait_for()
    visit.page.get_by_role("button", name="New conversation").click()
    visit.ask("short")
    assert visit.page.evaluate("Object.values(localStorage).some((text) => text.includes('You said short.'))")
    assert warning.is_visible(), "the first conversation is not stored"
    delete(visit)
    warning.wait_for(state="hidden")
    assert titles(visit) == ["short"]


def test_room_that_a_deletion_frees_is_used(visit: Visit) -> None:
    visit.send("y" * 20_000)
    visit.page.locator(".failure").wait_for()
    visit.page.evaluate(FILL, 10_000)
    visit.page.get_by_role("button", name="New conversation").click()
    visit.send("x" * 20_000)
    visit.page.locator(".failure").wait_for()
    warning = visit.page.get_by_role("alert").filter(has_text="no more room")
    warning.wait_for()
    delete(visit)
    warning.wait_for(state="hidden")
    visit.page.reload()
    visit.page.locator(".failure").wait_for()
    assert titles(visit) == [f"{'x' * 59}…"]
