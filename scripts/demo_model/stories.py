"""Generates stories with a subject, a plot and an end.

A story has one of a dozen plots, in five to nine sentences. Each step of a plot
has several wordings. All of them mention the requested subject by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from scripts.demo_model import words
from scripts.demo_model.grammar import an, capital, expand, one
from scripts.demo_model.plots import SOMEBODY, SOMETHING

_ANYTHING = (
    "[Tell|Write] me a [|short ]story[.|, please.]",
    "[Can|Could] you tell me a story?",
    "[tell me a story|a story]",
)
_REQUESTS = (
    "[Tell|Write|Tell] me a [|short |nice |little |bedtime ]story about {subject}.",
    "[Can|Could] you [tell|write] me a [|short |little ]story about {subject}?",
    "[I would like|I want|Please tell me|Please write|Write] a [|short ]story about {subject}.",
    "A story about {subject}, please.",
    "[Do you know|Have you got] a story about {subject}?",
    "[tell me a story|story|a story|write a story] about {subject}",
)


@dataclass(frozen=True, slots=True)
class Story:
    """A story, and the facts that questions can ask for.

    Attributes:
        request: a request for the story.
        text: the story.
        about: the subject, as in "a small fox named Pip".
        called: the name of the subject, if it has one.
        kind: the kind of the subject.
        he, his: the pronouns of the subject.
        helper: the helper, if there is one.
    """

    request: str
    text: str
    about: str
    called: str | None
    kind: str
    he: str
    his: str
    helper: str | None


_SKILLS = words.listed(
    "swim,fly a kite,sing,bake bread,read,paint,whistle,ride a bicycle,dance,climb a tree,skate,play the drum,jump"
)
_DREAMS = words.listed(
    "the sea,the snow,the big city,the high mountains,the desert,the moon,the other side of the hill"
)
_PRONOUNS = {"he": ("his", "him"), "she": ("her", "her"), "it": ("its", "it")}

_BEGINNINGS = (
    "Once upon a time there [was|lived] {about}.",
    "There once was {about}.",
    "In a [small house|quiet village] by the {place} lived {about}.",
    "Long ago, near the {place}, there lived {about}.",
    "This is the story of {about}.",
)
_BEGINNINGS_OF_THINGS = (
    "Once upon a time there was {about}.",
    "There once was {about}.",
    "In a [small house|quiet village] near the {place} there was {about}.",
    "This is the story of {about}.",
)


def story(random: Random, *, strange: bool = False) -> Story:
    """Return a story; if `strange`, about an invented subject, with a part of the plot in the request."""
    thing = random.random() < 0.2
    plot = random.choice(SOMETHING if thing else SOMEBODY)
    kind, called, he = _subject(random, thing, strange)
    trait = random.choice([trait for trait in words.TRAITS if trait != "old" or kind not in ("girl", "boy")])
    his, him = _PRONOUNS[he]
    helper, friend = random.sample([helper for helper in words.HELPERS if helper != kind], 2)
    name = called or f"the {kind}"
    naming = "" if called is None else f" [named|called] {called}"
    values = {
        "name": name,
        "Name": capital(name),
        "he": he,
        "He": capital(he),
        "his": his,
        "His": capital(his),
        "him": him,
        "kind": kind,
        "a_kind": an(kind),
        "trait": trait,
        "child": random.choice(words.GIRLS + words.BOYS),
        "helper": helper,
        "a_helper": an(helper) if random.random() < 0.5 else f"{an(_adjective(random))} {helper}",
        "a_friend": an(friend),
        "thing": random.choice(words.BELONGINGS),
        "place": random.choice(words.PLACES),
        "skill": random.choice(_SKILLS),
        "dream": random.choice(_DREAMS),
    }
    values["A_helper"] = capital(values["a_helper"])
    # A request has more or fewer details of the subject, and sometimes a part of the plot.
    traits = f"{an(trait)} {kind}"
    asked = f"{random.choice((an(kind), an(kind), traits))}{random.choice((naming, naming, ''))}"
    if called and random.random() < 0.1:
        asked = f"{called} the {kind}"
    if strange or random.random() < 0.3:
        asked += f" {random.choice(plot.asked)}"
    requests = _ANYTHING if random.random() < 0.06 else _REQUESTS
    about = traits + naming
    beginnings = _BEGINNINGS_OF_THINGS if thing else _BEGINNINGS
    about = expand(about, random)
    sentences = [one(beginnings, random, {**values, "about": about})]
    sentences += [one(step, random, values) for step in plot.steps]
    text = " ".join(sentences)
    return Story(
        request=one(requests, random, {"subject": expand(asked, random, values)}),
        text=text,
        about=about,
        called=called,
        kind=kind,
        he=he,
        his=his,
        helper=helper if f"the {helper}" in text and not thing else None,
    )


def _adjective(random: Random) -> str:
    return random.choice(("old", "wise", "friendly", "little", "kind", "grey"))


def _subject(random: Random, thing: bool, strange: bool) -> tuple[str, str | None, str]:
    """Return the subject of a story: its kind, its name or None, and its pronoun."""
    invented = made_up_name(random)
    if thing:
        kind = words.made_up(random) if strange or random.random() < 0.1 else random.choice(words.THINGS)
        return kind, random.choice((None, None, None, random.choice(words.PETS), invented)), "it"
    if not strange and random.random() < 0.25:
        girl = random.random() < 0.5
        known = random.choice(words.GIRLS if girl else words.BOYS)
        return ("girl" if girl else "boy"), random.choice((known, known, invented)), ("she" if girl else "he")
    kind = words.made_up(random) if strange or random.random() < 0.15 else random.choice(words.ANIMALS)
    called = random.choice((None, None, random.choice(words.PETS), random.choice(words.PETS), invented))
    he = {"king": "he", "prince": "he", "queen": "she", "princess": "she", "witch": "she", "wizard": "he"}
    return kind, called, he.get(kind) or random.choice(("he", "she"))


def made_up_name(random: Random) -> str:
    return words.made_up(random).capitalize()
