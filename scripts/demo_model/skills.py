"""Measures the skills of the demo model with greedy replies to questions that are in no training text.

docs/demo-model.md has the printed figures. tests/models/test_demo_model.py asserts
lower shares of smaller samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import erllama
from scripts.demo_model import sums, words
from scripts.demo_model.grammar import an

Message = dict[str, object]

WEATHER: Message = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# Long enough that caching pays. Questions can ask for its facts.
SYSTEM = (
    "You are the keeper of a small lighthouse, and a patient teller of stories. Answer in plain words, keep to "
    "what you have seen, and when you do not know a thing, say so. The library opens at 9 and closes at 17. Use "
    "short sentences and common words. The ladder is in the cellar. A map costs 14 coins. Mia looks after the "
    "garden."
)
SUBJECTS = ("a fox", "a girl named Mia", "an old clock", "a brave mouse", *map(an, words.UNSEEN))
_CONDITIONS = ("rain", "sunny", "snow", "cloudy")


class Skill(NamedTuple):
    """The number of correct results, and the failures."""

    right: int
    asked: int
    wrong: list[str]


class ToolSkill(NamedTuple):
    """The numbers of correct tool calls and of correctly reported results, and the failures."""

    called: int
    reported: int
    asked: int
    wrong: list[str]


class StorySkill(NamedTuple):
    """The numbers of stories that end, and of stories that name their subject, and the failures."""

    ended: int
    kept: int
    asked: int
    wrong: list[str]


def reply(model: erllama.Model, turns: Sequence[str], *, system: str | None = None) -> erllama.ChatCompletion:
    """Return the reply to the last of several user messages, after replies to the earlier ones."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        completion = model.chat(messages, max_tokens=300, temperature=0.0)
        messages.append(completion.message)
    return completion


def unlearned_sums(n: int, seed: int = 7) -> list[tuple[int, bool, int]]:
    """Return sums, or differences if the middle is False, of numbers below 50 that are in no training text."""
    random = Random(seed)
    found: list[tuple[int, bool, int]] = []
    while len(found) < n:
        a, b, plus = random.randrange(50), random.randrange(50), random.random() < 0.5
        if (plus or a >= b) and sums.held_out(a, plus, b) and (a, plus, b) not in found:
            found.append((a, plus, b))
    return found


def measure_sums(model: erllama.Model, n: int) -> Skill:
    """Measure how many of `n` sums have correct thinking and a correct answer."""
    wrong = []
    for a, plus, b in unlearned_sums(n):
        completion = reply(model, [f"What is {a} {'+' if plus else '-'} {b}?"])
        if not completion.thinking or completion.text != sums.answer(a, plus, b):
            wrong.append(f"{completion.thinking} {completion.text}")
    return Skill(n - len(wrong), n, wrong)


def measure_tool_use(model: erllama.Model, cities: Sequence[str]) -> ToolSkill:
    """Measure for how many cities the model calls the weather tool, and reports its result correctly."""
    called = reported = 0
    wrong = []
    for i, city in enumerate(cities):
        messages: list[Message] = [{"role": "user", "content": f"What is the weather in {city}?"}]
        call = model.chat(messages, tools=[WEATHER], max_tokens=100, temperature=0.0)
        if [(each.name, each.arguments) for each in call.tool_calls] != [("get_weather", {"city": city})]:
            wrong.append(f"{city}: {call.text}{call.tool_calls}")
            continue
        called += 1
        degrees, condition = i % 40 - 6, _CONDITIONS[i % len(_CONDITIONS)]
        result = json.dumps({"temperature": degrees, "condition": condition})
        messages += [call.message, {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": result}]
        answer = model.chat(messages, tools=[WEATHER], max_tokens=100, temperature=0.0).text
        if city in answer and f"{degrees} degrees" in answer and condition in answer:
            reported += 1
        else:
            wrong.append(f"{city}, {result}: {answer}")
    return ToolSkill(called, reported, len(cities), wrong)


def measure_stories(model: erllama.Model, subjects: Sequence[str]) -> StorySkill:
    """Measure how many stories end, and how many keep their subject: mention it or its name."""
    ended = kept = 0
    wrong = []
    for subject in subjects:
        completion = reply(model, [f"Tell me a story about {subject}."])
        ended += completion.finish_reason == "stop"
        kept += subject.split()[-1] in completion.text
        if completion.finish_reason != "stop" or subject.split()[-1] not in completion.text:
            wrong.append(f"{subject}: {completion.text}")
    return StorySkill(ended, kept, len(subjects), wrong)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_model.skills", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=erllama.demo_model(), help="the demo model")
    path = parser.parse_args().model
    with erllama.Cache(ram="256MiB") as cache, erllama.load_model(path, cache=cache, n_ctx=1024) as model:
        calculated = measure_sums(model, 200)
        used = measure_tool_use(model, [*words.CITIES[:88], *words.UNSEEN_CITIES])
        stories = measure_stories(model, [an(kind) for kind in (*words.ANIMALS, *words.THINGS, *words.UNSEEN)])
        print(f"correct sums: {calculated.right} of {calculated.asked}")
        print(f"tools called with the city: {used.called} of {used.asked}, results reported: {used.reported}")
        print(f"stories that end: {stories.ended} of {stories.asked}, that keep their subject: {stories.kept}")
        for each in (*calculated.wrong, *used.wrong, *stories.wrong):
            print(f"  failure: {each}")


if __name__ == "__main__":
    main()
