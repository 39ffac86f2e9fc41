"""The demo model does what docs/demo-model.md says with greedy sampling, and its training text is sound."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from random import Random

import pytest

import erllama
from support.doc_pages import blocks
from support.paths import ROOT

sys.path.append(str(ROOT))

from scripts.demo_model import conversations, rows, skills, sums, weather, words
from scripts.demo_model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo() -> Iterator[erllama.Model]:
    with (
        erllama.Cache(ram="256MiB") as cache,
        erllama.load_model(erllama.demo_model(), cache=cache, n_ctx=1024, n_threads=1) as model,
    ):
        yield model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return conversations.learned_tokenizer()


# --- What it can do -----------------------------------------------------------------------------
#
# Each skill is asserted as a share. Another processor adds the same products in another order, which changes the
# last bits of logits. A story has near-ties: log-probabilities 0.002 apart were measured. So its text may differ.


def test_sums_are_thought_through_and_mostly_right(demo: erllama.Model) -> None:
    found = skills.measure_sums(demo, 20)
    assert found.right >= 16, found.wrong


def test_tools_are_called_with_the_city_and_their_results_reported(demo: erllama.Model) -> None:
    found = skills.measure_tool_use(demo, ["Oslo", *words.UNSEEN_CITIES[:9]])
    assert found.called >= 9, found.wrong
    assert found.reported >= 8, found.wrong


def test_stories_end_and_keep_their_subject(demo: erllama.Model) -> None:
    found = skills.measure_stories(demo, skills.SUBJECTS)
    assert found.ended >= 8, found.wrong
    assert found.kept >= 8, found.wrong  # the model may misspell a word that it has never read


SHORT_TALK = [
    (["Hello!"], "Hello"),
    (["Who are you?"], "the demo model of erllama"),
    (["What can you do?"], "story"),
    (["What is a KV cache?"], "keys and values"),
    (["What is the capital of France?"], "I do not know"),
    (["What is the weather in Oslo?"], "tool"),
    (["My name is Mia.", "What is my name?"], "Mia"),
    (["What is 20 + 5?", "And minus 3?"], "22"),
    (["Tell me a story about a fox named Pip.", "What was the fox's name?"], "Pip"),
]
FACTS = [
    (["When does the library open?"], "opens at 9"),
    (["When does the library close?"], "closes at 17"),
    (["Where is the ladder?"], "cellar"),
    (["Who are you?", "How much is a map?"], "14 coins"),
]


def test_short_conversations_work(demo: erllama.Model) -> None:
    replies = [(skills.reply(demo, turns), expected) for turns, expected in SHORT_TALK]
    right = [reply.finish_reason == "stop" and expected in reply.text for reply, expected in replies]
    assert sum(right) >= 8, [reply.text for reply, _ in replies]


def test_facts_of_a_system_prompt_are_found(demo: erllama.Model) -> None:
    replies = [skills.reply(demo, turns, system=skills.SYSTEM).text for turns, _ in FACTS]
    right = [expected in reply for reply, (_, expected) in zip(replies, FACTS, strict=True)]
    assert sum(right) >= 3, replies


def test_the_model_does_not_think_when_thinking_is_disabled(demo: erllama.Model) -> None:
    messages = [{"role": "user", "content": "What is 14 + 5?"}]
    reply = demo.chat(messages, thinking="disabled", max_tokens=100, temperature=0.0)
    assert reply.thinking == ""
    assert reply.text.startswith("14 + 5 = ")


def test_a_story_continues_its_beginning(demo: erllama.Model) -> None:
    openings = [f"Once upon a time there was a small {kind}" for kind in ("fox", "cat", "girl", "clock")]
    replies = [demo.complete(opening, max_tokens=300, temperature=0.0) for opening in openings]
    complete = [reply.finish_reason == "stop" and reply.text.count(".") >= 4 for reply in replies]
    assert sum(complete) >= 3, [reply.text for reply in replies]


def test_the_demo_model_page_shows_its_real_replies(
    demo: erllama.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = blocks("docs/demo-model.md", "python")
    exec(compile(snippet.text, "docs/demo-model.md", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", snippet.text)
    page = (ROOT / "docs" / "demo-model.md").read_text()
    assert f"{erllama.demo_model().stat().st_size:,} bytes" in page
    assert f"{demo.info.n_params / 1e6:.2f} million parameters" in page
    assert f"{demo.info.n_layer} layers of width {demo.info.n_embd}" in page


# --- Its file -----------------------------------------------------------------------------------


def test_the_file_is_small_and_has_its_metadata(demo: erllama.Model) -> None:
    assert 1_000_000 <= erllama.demo_model().stat().st_size <= 3_000_000
    assert demo.info.name == "erllama demo"
    assert demo.info.architecture == "llama"
    assert demo.info.n_ctx_train == 1024


def test_libllama_tokenizes_like_the_training(demo: erllama.Model, tokenizer: Tokenizer) -> None:
    random = Random(5)
    texts = [conversations.conversation(random, long=i % 20 == 0).text() for i in range(100)]
    texts += ["  two  spaces\n\n\nx \n y\t\tz 3.14", "I'll DON'T Zürich São Paulo 12°C — “q” 日本 _a_b \r\n end "]
    for text in texts:
        assert tokenizer.encode(text) == demo.tokenize(text, parse_special=True).tolist()


def test_the_chat_template_matches_the_sources(demo: erllama.Model) -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "Hi"}]
    rendered = erllama.render_chat_template(conversations.TEMPLATE, messages, tools=[skills.WEATHER])
    assert demo.render_chat(messages, tools=[skills.WEATHER]) == rendered


# --- Its training text --------------------------------------------------------------------------


def test_training_text_is_deterministic(tokenizer: Tokenizer) -> None:
    def digest(seed: int) -> str:
        found = hashlib.sha256()
        for batch in islice(rows.batches(tokenizer, seed), 3):
            found.update(batch.tokens.tobytes() + batch.segments.tobytes() + batch.worth.tobytes())
        return found.hexdigest()

    assert digest(1) == digest(1) != digest(2)


def test_training_sums_are_right_and_differ_from_the_tests() -> None:
    random = Random(3)
    for _ in range(500):
        made = sums.arithmetic(random)
        assert made.thought.endswith(f" So {made.value}.")
        assert str(made.value) in made.answer
        a, sign, b = re.match(r"(\d+) ([+-]) (\d+):", made.thought).groups()  # type: ignore[union-attr]
        assert made.value == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
        assert not sums.held_out(int(a), sign == "+", int(b))


def test_training_calls_are_json_with_the_requested_city() -> None:
    random = Random(3)
    for _ in range(300):
        made = conversations.Conversation(tools=weather.tools(random))
        made.messages += weather.turn(random, made.tools)
        calls = re.findall(r"<tool_call>\n(.*)\n</tool_call>", made.text().partition("</tools>")[2])[1:]
        names = {tool.name: tool.parameter for tool in made.tools}
        assert calls
        for call in map(json.loads, calls):
            (city,) = call["arguments"].values()
            assert call["arguments"] == {names[call["name"]]: city}
            assert city in str(made.messages[0]["content"])


def test_test_questions_are_not_in_the_training_text() -> None:
    random = Random(3)
    text = " ".join(conversations.conversation(random).text() for _ in range(3000))
    for word in (*words.UNSEEN, *words.UNSEEN_CITIES):
        assert not re.search(rf"\b{word}\b", text)
