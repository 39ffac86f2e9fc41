"""The chat page in a browser: replies, stop, reload, branches, thinking, tools, keys and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import erllama
from erllama.server import ApiKey
from support.browser import Visit, visiting
from support.chat.scripted_model import TOOLS
from support.http_server import RunningServer, running
from support.page_model import HOSTILE, SAMPLE, THOUGHTS, long_text, page_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FIGURES = re.compile(r"([\d,]+) of ([\d,]+) prompt tokens from ([a-z ]+), first token after [\d.]+ s")


@pytest.fixture
def visit(chrome: Browser, page_server: RunningServer) -> Iterator[Visit]:
    with visiting(chrome, page_server.url) as visit:
        yield visit


def figures(visit: Visit) -> tuple[int, int, str]:
    """Return what the last reply shows: cached tokens, prompt tokens, and where the cached ones came from."""
    text = visit.page.locator(".figures").last.inner_text()
    found = FIGURES.search(text)
    assert found, text
    cached, prompt, place = found.groups()
    assert f"{int(prompt.replace(',', '')) - int(cached.replace(',', '')):,} computed" in text
    return int(cached.replace(",", "")), int(prompt.replace(",", "")), place


def bodies(visit: Visit) -> list[dict[str, Any]]:
    """Return a list to which the bodies of further requests for replies are added."""
    found: list[dict[str, Any]] = []
    visit.page.on(
        "request",
        lambda request: request.post_data and found.append(json.loads(request.post_data)),  # type: ignore[func-returns-value]
    )
    return found


# --- replies ---------------------------------------------------------------------------------------


def test_a_reply_shows_how_much_of_its_prompt_was_cached(visit: Visit) -> None:
    assert visit.ask(f"{long_text()} first") == f"You said {long_text()} first."
    _, n_first, _ = figures(visit)
    assert n_first > 400
    assert visit.ask("second") == "You said second."
    cached, n_second, place = figures(visit)
    assert n_first <= cached < n_second
    assert place.startswith(("the context", "memory"))
    assert "reply tokens" in visit.page.locator(".figures").last.inner_text()


def test_after_a_restart_the_prompt_comes_from_the_disk(chrome: Browser, tmp_path: Path) -> None:
    with (
        erllama.Cache(ram=None, disk=tmp_path, block_size=32) as cache,
        page_model(cache=cache, id="restarted") as model,
    ):
        with running(model) as server, visiting(chrome, server.url) as visit:
            visit.ask(long_text())
            stored, port = visit.page.context.storage_state(), server.address[1]
    with (
        erllama.Cache(ram=None, disk=tmp_path, block_size=32) as cache,
        page_model(cache=cache, id="restarted") as model,
    ):
        with running(model, listen={"port": port}) as server:
            with visiting(chrome, server.url, storage_state=stored) as visit:
                assert visit.replies() == [f"You said {long_text()}."]
                assert visit.ask("and after the restart?") == "You said and after the restart?."
                cached, n_prompt, place = figures(visit)
    assert place == "disk"
    assert cached > 0.9 * n_prompt


def test_markdown_becomes_elements(visit: Visit) -> None:
    visit.ask("sample")
    text = visit.page.locator("article.assistant .text")
    assert text.locator("strong").inner_text() == "keys and values"
    assert text.locator("h5").inner_text() == "What that saves"
    assert text.locator("ol > li").count() == 2
    assert text.locator("ol ul > li").count() == 2
    assert text.locator("th").all_inner_texts() == ["Tier", "Survives", "Speed"]
    assert text.locator("blockquote code").inner_text() == "exact"
    code = SAMPLE.split("```python\n")[1].split("\n```")[0]
    assert text.locator("pre").inner_text() == code
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text.get_by_role("button", name="Copy the code").click()
    visit.page.get_by_text("Copied").wait_for()
    assert visit.page.evaluate("navigator.clipboard.readText()") == code


def test_markup_and_script_in_a_reply_stay_text(visit: Visit) -> None:
    visit.ask("hostile")
    page = visit.page
    text = page.locator("article.assistant .text")
    shown = text.inner_text()
    for part in ("<script>window.hacked = 1</script>", 'onerror="window.hacked = 2"', "javascript:window.hacked=3"):
        assert part in shown
    assert text.locator("script, img, iframe, b").count() == 0
    links = text.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://evil.example/pixel.png",
        "https://example.org/a?b=1",
    ]
    for link in links.all():
        assert "noopener" in (link.get_attribute("rel") or "")
    assert "<b>a</b>" in text.locator("th").first.inner_text()
    page.reload()  # now from the storage
    page.locator("article.assistant .text pre").wait_for()
    assert page.locator("article script, article img, article iframe").count() == 0
    assert page.evaluate("window.hacked === undefined")
    assert text.inner_text().count("hacked") == HOSTILE.count("hacked")


def test_the_policy_stops_markup_that_a_mistake_would_insert(chrome: Browser, page_server: RunningServer) -> None:
    with visiting(chrome, page_server.url) as visit:
        thrown = visit.page.evaluate(
            """() => {
                try { document.body["inner" + "HTML"] = "<img src=x onerror='window.hacked = 1'>"; return ""; }
                catch (error) { return error.name; }
            }"""
        )
        assert thrown == "TypeError"
        visit.problems.clear()


def test_stop_keeps_what_was_written(visit: Visit) -> None:
    for stop in (
        lambda: visit.page.get_by_role("button", name="Stop").click(),
        lambda: visit.page.keyboard.press("Escape"),
    ):
        visit.send("for ever")
        visit.page.locator("article.assistant .text").last.filter(has_text="word word").wait_for()
        stop()
        visit.wait_for_end()
        assert "word word" in visit.replies()[-1]
        assert visit.page.get_by_role("status").inner_text() == "Stopped."
    assert visit.ask("more") == "You said more."


def test_a_reload_keeps_the_conversation_also_within_a_reply(visit: Visit) -> None:
    visit.ask("one")
    visit.send("for ever")
    visit.page.locator("article.assistant .text").last.filter(has_text="word word").wait_for()
    visit.page.reload()
    visit.page.locator("article.assistant").last.wait_for()
    assert visit.page.locator(".bubble").all_inner_texts() == ["one", "for ever"]
    first, second = visit.replies()
    assert first == "You said one."
    assert "word word" in second
    assert visit.ask("two") == "You said two."


# --- branches --------------------------------------------------------------------------------------


def test_an_edit_makes_a_branch_and_the_first_one_stays(visit: Visit) -> None:
    visit.ask("one")
    visit.ask("two")
    first = visit.page.locator("article.user").first
    first.get_by_role("button", name="Edit").click()
    field = visit.page.get_by_role("textbox", name="Edit the message")
    assert field.input_value() == "one"
    field.fill("three")
    field.press("Enter")
    visit.page.get_by_text("You said three.").wait_for()
    visit.wait_for_end()
    assert visit.replies() == ["You said three."]
    assert "2 / 2" in first.inner_text()
    first.get_by_role("button", name="Previous version").click()
    assert visit.replies() == ["You said one.", "You said two."]
    assert "1 / 2" in first.inner_text()
    visit.page.reload()
    visit.page.get_by_text("You said two.").wait_for()
    first.get_by_role("button", name="Next version").click()
    assert visit.replies() == ["You said three."]


def test_another_reply_is_a_branch_too(visit: Visit) -> None:
    visit.ask("one")
    sent = bodies(visit)
    visit.page.get_by_role("button", name="Regenerate").click()
    visit.page.get_by_text("2 / 2").wait_for()
    visit.wait_for_end()
    assert visit.replies() == ["You said one."]
    assert sent[0]["messages"] == [{"role": "user", "content": "one"}]


# --- thinking, tools, settings -----------------------------------------------------------------------


def test_thinking_is_folded(visit: Visit) -> None:
    assert visit.ask("think") == "Thought through."
    thinking = visit.page.get_by_text(THOUGHTS)
    assert not thinking.is_visible()
    visit.page.get_by_text("Thought for").click()
    assert thinking.is_visible()
    sent = bodies(visit)
    visit.ask("more")
    assert sent[0]["messages"][1]["reasoning_content"] == THOUGHTS


def test_a_tool_call_is_shown_and_its_result_continues_the_chat(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Settings").click()
    tools = visit.page.get_by_label("Tools, as JSON")
    tools.fill("[{")
    tools.blur()
    visit.page.get_by_text("The tools are not JSON").wait_for()
    tools.fill(json.dumps(TOOLS))
    tools.blur()
    sent = bodies(visit)
    visit.send("call")
    result = visit.page.get_by_label("Result of get_time")
    result.wait_for()
    assert json.loads(visit.page.get_by_label("Arguments of get_time").inner_text()) == {"city": "Oslo"}
    result.fill("12:30")
    visit.page.get_by_role("button", name="Send result").click()
    visit.page.get_by_text("The tool says 12:30.").wait_for()
    visit.wait_for_end()
    assert sent[0]["tools"] == TOOLS
    call = sent[1]["messages"][1]["tool_calls"][0]
    assert sent[1]["messages"][2] == {"role": "tool", "tool_call_id": call["id"], "content": "12:30"}


def test_settings_are_fields_of_the_requests(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Settings").click()
    values = {"Temperature": "0.7", "Top p": "0.9", "Top k": "40", "Min p": "0.05", "Max tokens": "5", "Seed": "3"}
    for label, value in values.items():
        visit.page.get_by_label(label, exact=True).fill(value)
    visit.page.get_by_label("System prompt").fill("Be brief.")
    visit.page.get_by_label("Thinking").select_option("Off")
    sent = bodies(visit)
    visit.ask("hello")
    assert "reached the limit" in visit.page.locator("article.assistant").inner_text()
    body = sent[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    for name, value in {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 5,
        "seed": 3,
    }.items():
        assert body[name] == value
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    visit.page.reload()
    visit.page.get_by_role("button", name="Settings").click()
    assert visit.page.get_by_label("Temperature").input_value() == "0.7"


def test_a_model_is_chosen_from_those_of_the_server(chrome: Browser) -> None:
    with page_model(id="one") as one, page_model(id="two") as two, running([one, two]) as server:
        with visiting(chrome, server.url) as visit:
            model = visit.page.get_by_role("combobox", name="Model")
            model.locator("option").nth(1).wait_for(state="attached")
            assert model.locator("option").all_inner_texts() == ["one", "two"]
            sent = bodies(visit)
            model.select_option("two")
            visit.ask("hi")
            assert sent[0]["model"] == "two"


# --- keys and errors ---------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_stays_in_the_tab(chrome: Browser) -> None:
    with page_model(id="keyed") as model, running(model, keys=(ApiKey(secret="right"),)) as server:
        with visiting(chrome, server.url) as visit:
            field = visit.page.get_by_label("Key", exact=True)
            field.wait_for()
            field.fill("wrong")
            field.press("Enter")
            visit.page.get_by_text("The server does not know this key").wait_for()
            field.fill("right")
            field.press("Enter")
            visit.page.get_by_role("combobox", name="Model").wait_for()
            assert visit.ask("hi") == "You said hi."
            visit.page.reload()
            visit.page.get_by_role("combobox", name="Model").wait_for()
            assert visit.page.evaluate("sessionStorage.getItem('erllama.key')") == "right"
            assert "right" not in visit.page.evaluate("JSON.stringify(localStorage)")
            assert visit.page.context.cookies() == []


def test_a_refused_request_is_explained_and_can_be_tried_again(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Settings").click()
    visit.page.get_by_label("System prompt").fill("x" * 20000)
    visit.send("hello")
    failure = visit.page.locator(".failure")
    failure.wait_for()
    assert "8192" in failure.inner_text()
    visit.page.get_by_label("System prompt").fill("")
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.get_by_text("You said hello.").wait_for()
    assert failure.count() == 0
    assert "2 /" not in visit.page.locator("#messages").inner_text(), "the failed reply is gone"


def test_a_server_that_is_gone_is_an_error_in_words(visit: Visit) -> None:
    visit.page.get_by_role("combobox", name="Model").wait_for()
    visit.page.context.set_offline(True)
    visit.send("hello")
    visit.page.get_by_text("The server cannot be reached").wait_for()
    visit.page.context.set_offline(False)
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.get_by_text("You said hello.").wait_for()


def test_try_again_on_an_earlier_reply_keeps_what_followed_it(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("combobox", name="Model").wait_for()
    page.context.set_offline(True)
    visit.send("one")
    page.locator(".failure").wait_for()
    page.context.set_offline(False)
    sent = bodies(visit)
    assert visit.ask("two") == "You said two."
    assert [each["content"] for each in sent[0]["messages"]] == ["one", "two"], "without the empty reply"
    visit.send("for ever")
    page.get_by_text("word word").wait_for()
    retry = page.get_by_role("button", name="Try again")
    assert retry.is_disabled(), "another reply runs"
    page.get_by_role("button", name="Stop").click()
    visit.wait_for_end()
    retry.click()
    page.get_by_text("You said one.").wait_for()
    visit.wait_for_end()
    page.reload()
    page.get_by_text("You said one.").wait_for()
    assert "2 / 2" in page.locator("article.assistant").inner_text()
    page.get_by_role("button", name="Previous version").click()
    page.locator(".failure").wait_for()
    assert page.locator(".bubble").all_inner_texts() == ["one", "two", "for ever"]
    assert visit.replies()[1] == "You said two."


# --- several conversations ---------------------------------------------------------------------------


def titles(visit: Visit) -> list[str]:
    return visit.page.locator("#conversations .open").all_inner_texts()


def test_conversations_are_listed_renamed_and_deleted(visit: Visit) -> None:
    visit.ask("about cats")
    visit.page.get_by_role("button", name="New conversation").click()
    visit.ask("about dogs")
    assert titles(visit) == ["about dogs", "about cats"]
    visit.page.get_by_role("button", name="Rename, export or delete: about dogs").click()
    visit.page.get_by_label("Name", exact=True).fill("Dogs")
    visit.page.get_by_role("button", name="Rename", exact=True).click()
    assert titles(visit) == ["Dogs", "about cats"]
    visit.page.get_by_role("button", name="about cats", exact=True).click()
    assert visit.replies() == ["You said about cats."]
    visit.page.get_by_role("button", name="Rename, export or delete: about cats").click()
    visit.page.get_by_role("button", name="Delete", exact=True).click()
    visit.page.get_by_role("button", name="Delete for good").click()
    assert titles(visit) == ["Dogs"]
    visit.page.reload()
    visit.page.get_by_text("You said about dogs.").wait_for()
    assert titles(visit) == ["Dogs"]


def test_conversations_are_exported_and_imported(visit: Visit, tmp_path: Path) -> None:
    visit.ask("about cats")
    visit.page.get_by_role("button", name="Regenerate").click()
    visit.page.get_by_text("2 / 2").wait_for()
    visit.wait_for_end()
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Export all").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    visit.page.locator("#import-file").set_input_files(file)
    visit.page.locator("#conversations li").nth(1).wait_for()
    assert titles(visit) == ["about cats", "about cats"]
    assert "2 / 2" in visit.page.locator("#messages").inner_text()
    for content, words in (
        ("no JSON", "has no conversations"),
        (json.dumps({"format": "other"}), "has no conversations"),
        (file.read_text().replace('"role": "user"', '"role": "root"', 1), "is damaged"),
        (re.sub(r'"parent": "\w+"', '"parent": "gone"', file.read_text()), "is damaged"),
    ):
        file.write_text(content)
        visit.page.locator("#import-file").set_input_files(file)
        visit.page.get_by_role("alert").filter(has_text=words).wait_for()
    assert len(titles(visit)) == 2


def test_a_damaged_entry_of_the_storage_does_not_break_the_page(visit: Visit) -> None:
    visit.ask("fine")
    for value in ("{", "null", '{"id": "x", "messages": [{"role": "user"}]}', '{"id": "other", "messages": []}'):
        visit.page.evaluate("value => localStorage.setItem('erllama.conversation.x', value)", value)
        visit.page.reload()
        visit.page.get_by_text("You said fine.").wait_for()
        assert titles(visit) == ["fine"]


def test_what_can_be_read_of_a_damaged_conversation_is_shown(visit: Visit) -> None:
    visit.ask("one")
    visit.ask("two")
    visit.page.evaluate(
        """() => { const key = Object.keys(localStorage).find((each) => each.startsWith("erllama.conversation."));
        const stored = JSON.parse(localStorage.getItem(key));
        stored.messages.splice(1, 1);
        localStorage.setItem(key, JSON.stringify(stored)); }"""
    )
    visit.page.reload()
    visit.page.get_by_text("You said two.").wait_for()
    assert visit.page.locator(".bubble").all_inner_texts() == ["one", "two"]
    assert visit.ask("three") == "You said three."
