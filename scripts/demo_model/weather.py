"""Generates tool use for the weather and the time in a city: schema, call, result and answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from scripts.demo_model import words
from scripts.demo_model.grammar import capital, expand, one

Message = dict[str, object]

_WEATHER_NAMES = ("get_weather", "get_weather", "get_weather", "weather", "current_weather", "get_current_weather")
_TIME_NAMES = ("get_time", "get_time", "time", "current_time", "get_local_time")
_PARAMETERS = ("city", "city", "city", "city", "location", "place", "town")
_WEATHER_DESCRIPTIONS = (
    "[Get|Gives|Returns|Tells|Look up] [the|the current] weather [in|of|for] a [city|place|town][|.]",
    "The [|current ]weather in a [city|place|town][|.]",
    "Weather [report|forecast] for a city[|.]",
    "[Current|Get the] temperature and conditions [in|for] a city[|.]",
)
_TIME_DESCRIPTIONS = (
    "[Get|Gives|Returns|Tells] the [local |current |]time in a [city|place|town][|.]",
    "The [|local |current ]time in a [city|place|town][|.]",
)
_WEATHER_QUESTIONS = (
    "What is the weather in {city}?",
    "What is the weather [like|today|now] in {city}?",
    "What's the weather [|like ]in {city}[| today]?",
    "How is the weather in {city}[| today| now| right now]?",
    "[Can|Could] you tell me the weather in {city}?",
    "[Tell me the weather|Weather|The weather|weather] in {city}[|, please][.|]",
    "[Is it raining|Is it cold|Is it warm|Is it sunny|How warm is it|How cold is it] in {city}[| now| today]?",
    "Do I need [an umbrella|a coat] in {city}[| today]?",
    "I am going to {city}. [What is the weather like there|How is the weather there]?",
)
_TIME_QUESTIONS = (
    "What time is it in {city}[| now| right now]?",
    "[Can|Could] you tell me the time in {city}?",
    "What is the [|local ]time in {city}?",
    "[How late is it in {city}?|Tell me the time in {city}.]",
)


@dataclass(frozen=True, slots=True)
class Sky:
    """A kind of weather: in tool results, in answers, its range of degrees, and advice."""

    condition: str
    phrase: str
    coldest: int
    warmest: int
    advice: str = ""


_SKIES = (
    Sky("rain", "raining", 1, 25, "Take an umbrella."),
    Sky("light rain", "raining a little", 1, 25, "You may need an umbrella."),
    Sky("snow", "snowing", -15, 2, "Put on a warm coat."),
    Sky("sunny", "sunny", -10, 38, "Enjoy the sun!"),
    Sky("clear", "clear", -15, 35),
    Sky("cloudy", "cloudy", -8, 30),
    Sky("fog", "foggy", -3, 15),
    Sky("storm", "stormy", 3, 28, "Better stay inside."),
    Sky("wind", "windy", -5, 28),
    Sky("hail", "hailing", 0, 12, "Better stay inside."),
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that takes the name of a city."""

    kind: str  # "weather" or "time"
    name: str
    parameter: str
    schema: Message

    def call(self, city: str) -> Message:
        return {"type": "function", "function": {"name": self.name, "arguments": {self.parameter: city}}}


def tools(random: Random) -> list[Tool]:
    """Return the tools of a conversation: for the weather, often also for the time, in either order."""
    parameter = random.choice(_PARAMETERS)
    made = [_tool(random, "weather", random.choice(_WEATHER_NAMES), parameter)]
    if random.random() < 0.4:
        made.append(_tool(random, "time", random.choice(_TIME_NAMES), random.choice((parameter, "city"))))
        if random.random() < 0.5:
            made.reverse()
    elif random.random() < 0.12:
        made = [_tool(random, "time", random.choice(_TIME_NAMES), parameter)]
    return made


def _tool(random: Random, kind: str, name: str, parameter: str) -> Tool:
    field: Message = {"type": "string"}
    if random.random() < 0.35:
        field["description"] = expand("[The name of the|The|Name of the|A] [city|place|town][|.|, as Oslo]", random)
    properties: Message = {parameter: field}
    if random.random() < 0.12:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    parameters: Message = {"type": "object", "properties": properties}
    if random.random() < 0.8:
        parameters["required"] = [parameter]
    if random.random() < 0.3:
        parameters["additionalProperties"] = False
    function: Message = {"name": name}
    if random.random() < 0.9:
        function["description"] = one(_WEATHER_DESCRIPTIONS if kind == "weather" else _TIME_DESCRIPTIONS, random)
    function["parameters"] = parameters
    return Tool(kind, name, parameter, {"type": "function", "function": function})


def turn(random: Random, available: list[Tool], *, strange: bool = False) -> list[Message]:
    """Return a question for one of the tools, its call, the result and the answer."""
    tool = random.choice(available)
    cities = [words.city(random, strange=strange)]
    if random.random() < 0.12:
        cities.append(words.city(random))
    questions = _WEATHER_QUESTIONS if tool.kind == "weather" else _TIME_QUESTIONS
    results = [_weather(random, city) if tool.kind == "weather" else _time(random, city) for city in cities]
    asked: Message = {"role": "user", "content": one(questions, random, {"city": " and ".join(cities)})}
    calls: Message = {"role": "assistant", "content": "", "tool_calls": [tool.call(city) for city in cities]}
    outputs: list[Message] = [{"role": "tool", "content": result} for result, _ in results]
    return [
        asked,
        calls,
        *outputs,
        {"role": "assistant", "content": " ".join(answer for _, answer in results)},
    ]


def without_tools(random: Random) -> tuple[str, str]:
    """Return a question about the weather without a tool for it, and the answer."""
    question = one((*_WEATHER_QUESTIONS, *_TIME_QUESTIONS), random, {"city": words.city(random)})
    return question, "I cannot look that up here. Give me a tool for it, and I will call it."


_NOT_FOUND = '[{{"error": "unknown [city|place]"}}|unknown [city|place]|not found|error: no such city]'


def _weather(random: Random, city: str) -> tuple[str, str]:
    """Return the result of the tool, and the answer."""
    sky = random.choice(_SKIES)
    degrees = random.randint(sky.coldest, sky.warmest)
    if random.random() < 0.07:
        result = expand(_NOT_FOUND, random)
        return result, f"I could not find the weather for {city}."
    shown: dict[str, object] = {
        random.choice(("temperature", "temperature", "temp", "degrees")): degrees,
        random.choice(("condition", "condition", "conditions", "weather", "sky")): sky.condition,
    }
    if random.random() < 0.25:
        shown = {random.choice(("city", "location", "place")): city, **shown}
    if random.random() < 0.2:
        shown[random.choice(("wind", "humidity"))] = random.randint(1, 90)
    pattern = random.choice(
        (
            "{degrees} degrees, {condition}",
            "{degrees} degrees and {condition}",
            "{condition}, {degrees} degrees",
            "{degrees} C, {condition}",
            "{degrees}°C, {condition}",
            "{Condition}, {degrees} °C.",
            "It is {degrees} degrees and {phrase} in {city}.",
        )
    )
    text = pattern.format(
        degrees=degrees, condition=sky.condition, Condition=capital(sky.condition), phrase=sky.phrase, city=city
    )
    result = json.dumps(shown, ensure_ascii=False) if random.random() < 0.6 else text
    return result, f"In {city} it is {degrees} degrees and {sky.phrase}. {sky.advice}".rstrip()


def _time(random: Random, city: str) -> tuple[str, str]:
    clock = f"{random.randrange(24)}:{random.randrange(60):02}"
    result = json.dumps({"time": clock}) if random.random() < 0.4 else clock
    return result, f"It is {clock} in {city}."
