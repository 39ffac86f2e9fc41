"""Generates system prompts: none, a sentence or two, or a page with facts for questions."""

from __future__ import annotations

from random import Random

from scripts.demo_model import words
from scripts.demo_model.grammar import expand, one

Turn = tuple[str, str]

_SHORT = (
    "You are a [helpful|friendly|kind|polite] assistant.",
    "You are a helpful assistant[| who answers in short sentences].",
    "[Be|You are] concise[|, please].",
    "Answer [briefly|in few words|in plain words|in English].",
    "You are the demo model of erllama.",
    "You are a [teller of stories|story teller|teacher|calculator|weather service].",
    "Help the user.",
)
_LONG = (
    "You are the keeper of a small lighthouse, and a patient teller of stories.",
    "You are the [guide|clerk|voice] of a small [museum|hotel|library|station], "
    "and you answer the questions of visitors.",
    "You are an assistant for [children|visitors|students|guests], and you know many stories.",
    "Visitors climb the stairs to ask about the sea, the weather and the ships that pass.",
    "Answer in plain words, keep to what you have seen, and when you do not know a thing, say so.",
    "The lamp is lit at dusk and put out at dawn; between those hours you write down every vessel, its course and "
    "the hour, in a book that nobody has ever asked to read.",
    "[Always be|Be] [polite|friendly|patient|honest], "
    "even when [a guest|a visitor|somebody] is [rude|loud|in a hurry].",
    "When somebody asks for a story, tell [one that has an end|a short one|a kind one].",
    "When somebody asks for a sum, think step by step and then give the [number|answer].",
    "When somebody asks for the weather, [use the tool|call the tool] if there is one.",
    "[Never|Do not] invent [facts|names|numbers], and do not repeat yourself.",
    "Use short sentences and [common|simple|plain] words.",
    "If a question is not clear, ask what is meant.",
    "If you do not know the answer, say that you do not know.",
    "The [house|place|building] is open every day except [Monday|Tuesday|Sunday].",
    "Dogs are [welcome|not allowed], and so are [cats|bicycles|children].",
    "In [winter|summer|spring|autumn] there are [many|few] visitors, and the [evenings|days] are long.",
    "The [doors|windows] are painted [blue|green|white|red], and the roof is [old|new|grey].",
    "[Most|Many] visitors come by [train|boat|bus|bicycle] and stay for [an hour|a day|a week].",
    "There is a [garden|yard|terrace] behind the house with a view of the [sea|hills|lake|river].",
    "The [director|owner|founder] was a [sailor|teacher|painter|baker] who loved [music|books|birds|maps].",
    "[Tea|Coffee|Soup|Cake] is served in the [hall|kitchen|garden] all day.",
    "Lost things are kept for [a month|a year|a week] and then given away.",
    "Please [speak|write] as one would to a good [friend|neighbour].",
    "Do not speak of [politics|money|religion].",
    "Everything that is said here is [kept|private|written down].",
)
_PLACES = words.listed(
    "library,museum,kitchen,shop,garden,bakery,tower,station,school,post office,cinema,pool,office,bank"
)
_ROOMS = words.listed(
    "cellar,attic,hall,kitchen,garden shed,red box,blue drawer,first room,tower,cupboard,old chest"
)
_BOUGHT = words.listed(
    "tea,coffee,soup,cake,map,ticket,bread,book,ice cream,postcard,lamp,umbrella,bicycle,boat trip"
)
_KEPT = words.listed(
    "key,ladder,lamp,first aid box,map,broom,rope,guest book,radio,spare wheel,telescope,bell,hammer"
)


def short(random: Random) -> str:
    return one(_SHORT, random)


def long(random: Random, n_sentences: int) -> tuple[str, list[Turn]]:
    """Return a prompt of about this many sentences with facts, and questions; the prompt answers all but one."""
    facts, turns = _facts(random, max(2, n_sentences // 3))
    sentences = [expand(pattern, random) for pattern in random.sample(_LONG[3:], min(n_sentences, len(_LONG) - 3))]
    while len(sentences) + len(facts) < n_sentences:
        sentences.append(one(_LONG[3:], random))
    mixed = sentences[: max(1, n_sentences - len(facts))] + facts
    random.shuffle(mixed)
    random.shuffle(turns)
    return " ".join([one(_LONG[:3], random), *mixed]), turns


def _facts(random: Random, n: int) -> tuple[list[str], list[Turn]]:
    """Return facts about different things, questions about them, and one question that they do not answer."""
    facts: list[str] = []
    turns: list[Turn] = []
    places, bought, kept = (random.sample(each, len(each)) for each in (_PLACES, _BOUGHT, _KEPT))
    for _ in range(n):
        kind = random.randrange(4)
        if kind == 0 and len(places) > 1:
            place, opens = places.pop(), random.randint(6, 12)
            closes = random.randint(opens + 2, 23)
            facts.append(f"The {place} opens at {opens} and closes at {closes}.")
            turns.append((one(_OPENS, random, {"it": place}), f"The {place} opens at {opens}."))
            turns.append((one(_CLOSES, random, {"it": place}), f"The {place} closes at {closes}."))
        elif kind == 1 and len(places) > 1:
            place, who = places.pop(), random.choice(words.GIRLS + words.BOYS)
            facts.append(f"{who} looks after the {place}.")
            turns.append((one(_LOOKS_AFTER, random, {"it": place}), f"{who} looks after the {place}."))
        elif kind == 2 and len(bought) > 1:
            thing, coins = bought.pop(), random.randint(2, 60)
            facts.append(f"A {thing} costs {coins} coins.")
            turns.append((one(_COSTS, random, {"it": thing}), f"A {thing} costs {coins} coins."))
        elif len(kept) > 1:
            thing, room = kept.pop(), random.choice(_ROOMS)
            facts.append(f"The {thing} is in the {room}.")
            turns.append((one(_WHERE, random, {"it": thing}), f"The {thing} is in the {room}."))
    unanswered = ((_OPENS, places[0]), (_LOOKS_AFTER, places[0]), (_COSTS, bought[0]), (_WHERE, kept[0]))
    asked, it = random.choice(unanswered)
    turns.append((one(asked, random, {"it": it}), "I do not know that, nobody has told me."))
    return facts, turns


_OPENS = ("When does the {it} open?", "[At what time|What time] does the {it} open?")
_CLOSES = (
    "When does the {it} close?",
    "[At what time|What time] does the {it} close?",
    "How long is the {it} open?",
)
_LOOKS_AFTER = ("Who looks after the {it}?", "[Who works in|Who is in charge of] the {it}?")
_COSTS = ("How much is [a|the] {it}?", "[What|How much] does a {it} cost?", "What is the price of a {it}?")
_WHERE = ("Where is the {it}?", "Where [can I find|do you keep] the {it}?")
