"""Conversations of several turns, as messages; and sometimes plain text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from erllama.chat.templates.template import ChatTemplate
from scripts.demo_model import stories, sums, systems, talk, weather
from scripts.demo_model.grammar import one
from scripts.demo_model.tokenizer import END, Tokenizer

Message = dict[str, object]

TEMPLATE = (Path(__file__).parent / "template.jinja").read_text()
N_VOCAB = 768
_N_TEXTS = 4000  # training texts of the tokenizer
_TEMPLATE = ChatTemplate(TEMPLATE)


@dataclass(slots=True)
class Conversation:
    """Messages, their tools, whether replies think, and whether earlier thinking is left out."""

    messages: list[Message] = field(default_factory=list)
    tools: list[weather.Tool] = field(default_factory=list)
    thinking: bool = True
    forgetful: bool = False

    def text(self) -> str:
        """Return the text that the chat template renders."""
        tools = [tool.schema for tool in self.tools] or None
        messages = self.messages
        if self.forgetful:
            earlier = [{key: message[key] for key in message if key != "reasoning_content"} for message in messages]
            messages = [*earlier[:-1], messages[-1]]
        return _TEMPLATE.render(messages, tools=tools, add_generation_prompt=False, enable_thinking=self.thinking)

    def say(self, asked: str, answered: str, thought: str | None = None) -> None:
        reply: Message = {"role": "assistant", "content": answered}
        if thought and self.thinking:
            reply["reasoning_content"] = thought
        self.messages += [{"role": "user", "content": asked}, reply]


def conversation(random: Random, *, long: bool = False) -> Conversation:
    """Return a conversation of a few turns; or a long one, with many turns and a long system prompt."""
    made = Conversation(thinking=random.random() > 0.2, forgetful=random.random() < 0.1)
    questions: list[systems.Turn] = []
    kind = random.random()
    if long or kind < 0.13:
        text, questions = systems.long(random, random.randint(12, 34) if long else random.randint(3, 9))
        made.messages.append({"role": "system", "content": text})
    elif kind < 0.45:
        made.messages.append({"role": "system", "content": systems.short(random)})
    if random.random() < 0.35:
        made.tools = weather.tools(random)
    for _ in range(random.randint(3, 8) if long else random.choice((1, 1, 1, 1, 2, 2, 3))):
        _turn(made, random, questions)
    return made


def drill(random: Random) -> Conversation:
    """Return a drill of the hardest skills: sums, and copying names, facts and subjects."""
    made = Conversation(thinking=random.random() > 0.2)
    kind = random.random()
    if kind < 0.42:
        if random.random() < 0.3:
            made.messages.append({"role": "system", "content": systems.short(random)})
        for _ in range(random.randint(3, 6)):
            asked = sums.arithmetic(random, equal=random.random() < 0.06)
            made.say(asked.question, asked.answer, asked.thought)
    elif kind < 0.57:
        made.tools = weather.tools(random)
        for _ in range(random.randint(2, 4)):
            made.messages += weather.turn(random, made.tools, strange=True)
    elif kind < 0.77:
        text, questions = systems.long(random, random.randint(5, 12))
        made.messages.append({"role": "system", "content": text})
        for question in questions:
            made.say(*question)
    elif kind < 0.92:
        for _ in range(2):
            story = stories.story(random, strange=True)
            made.say(story.request, story.text)
    else:
        for _ in range(2):
            for turn in talk.introduction(random):
                made.say(*turn)
    return made


def _turn(made: Conversation, random: Random, questions: list[systems.Turn]) -> None:
    """Return a question and its answer, sometimes with a follow-up question."""
    if questions and random.random() < 0.5:
        made.say(*questions.pop())
        return
    if made.tools and random.random() < 0.6:
        made.messages += weather.turn(random, made.tools)
        return
    kind = random.random()
    if kind < 0.32:
        story = stories.story(random)
        made.say(story.request, story.text)
        if random.random() < 0.2:
            made.say(*_about_story(random, story))
    elif kind < 0.66:
        asked = sums.arithmetic(random)
        made.say(asked.question, asked.answer, asked.thought)
        if random.random() < 0.15:
            more = sums.arithmetic(random, first=asked.value)
            made.say(more.question, more.answer, more.thought)
    elif kind < 0.84:
        made.say(*talk.talk(random))
    elif kind < 0.92:
        made.say(*talk.unknown(random))
    elif kind < 0.96:
        told_name, asked_name = talk.introduction(random)
        made.say(*told_name)
        if random.random() < 0.4:
            made.say(*talk.talk(random))
        made.say(*asked_name)
    else:
        made.say(*(talk.talk(random) if made.tools else weather.without_tools(random)))


_ABOUT = ("What was [the|that|your] story about?", "[Who|What] was it about?", "Who was the story about?")


def _about_story(random: Random, story: stories.Story) -> talk.Turn:
    turns = [(one(_ABOUT, random), f"It was about {story.about}.")]
    if story.called:
        named = one((f"What was the {story.kind}'s name?", f"What was the {story.kind} called?"), random)
        turns.append((named, f"{story.his.capitalize()} name was {story.called}."))
    if story.helper:
        turns.append((f"Who did {story.called or 'the ' + story.kind} meet?", f"It was the {story.helper}."))
    return random.choice(turns)


def learned_tokenizer() -> Tokenizer:
    """Learn the tokenizer of the demo model from conversations. Deterministic; takes some seconds."""
    random = Random(1)
    return Tokenizer.learn((conversation(random).text() for _ in range(_N_TEXTS)), N_VOCAB)


def plain(random: Random) -> str:
    """Return a story without a chat around it, for completions."""
    return stories.story(random).text + END
