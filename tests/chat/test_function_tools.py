"""Python functions are tools: their schemas, their calls, and conversations that run them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

import pytest

import erllama
from erllama.chat.functions import function_schema
from support.chat.scripted_model import CALL, TOOLS, model_replying, user


class Place(TypedDict):
    """A place on earth."""

    name: str
    height: float


def get_time(city: str) -> str:
    """The time in a city."""
    if city == "Rome":
        raise ValueError("no such city")
    return f"noon in {city}"


THREADED = get_time  # arun_tools calls it in a thread


def search(
    query: str,
    limit: int = 5,
    order: Literal["new", "old"] = "new",
    near: Place | None = None,
    tags: Annotated[list[str], "Words that all results have."] = [],  # noqa: B006
) -> list[str]:
    """Search the archive.

    Finds documents by their words.

    Args:
        query (str): words to
            look for.
        limit: maximum number of results.

    Returns:
        titles.
    """
    return [query][:limit]


def test_a_schema_comes_from_signature_and_docstring() -> None:
    schema: Any = function_schema(search)
    function = schema["function"]
    assert schema["type"] == "function"
    assert function["name"] == "search"
    assert function["description"] == "Search the archive.\n\nFinds documents by their words."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "words to look for."},
            "limit": {"type": "integer", "description": "maximum number of results.", "default": 5},
            "order": {"enum": ["new", "old"], "default": "new"},
            "near": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "height": {"type": "number"}},
                        "required": ["height", "name"],
                        "additionalProperties": False,
                    },
                    {"type": "null"},
                ],
                "default": None,
            },
            "tags": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Words that all results have.",
                "default": [],
            },
        },
        "required": ["query"],
        "additionalProperties": False,
    }


def test_sphinx_docstrings_and_callable_objects_have_schemas() -> None:
    class Counter:
        """Counts."""

        def __call__(self, by: int, names: dict[str, bool]) -> int:
            return by

    def documented(a: str, b: float) -> None:
        """Does it.

        :param a: the first
            of two.
        :param float b: the second.
        :returns: nothing.
        """

    schema: Any = function_schema(documented)
    texts = [each["description"] for each in schema["function"]["parameters"]["properties"].values()]
    assert texts == ["the first of two.", "the second."]
    schema = function_schema(Counter())
    assert schema["function"]["parameters"]["properties"]["names"]["additionalProperties"] == {"type": "boolean"}


def no_annotation(x) -> None: ...  # type: ignore[no-untyped-def]
def any_number(*values: int) -> None: ...
def other_type(x: bytes) -> None: ...


@pytest.mark.parametrize(
    ("function", "problem"),
    [(no_annotation, "no annotation"), (any_number, "named parameters"), (other_type, "TypedDict")],
)
def test_a_parameter_without_a_schema_is_refused(function: Callable[..., object], problem: str) -> None:
    with pytest.raises(erllama.OptionError, match=problem) as error:
        function_schema(function)
    assert function.__name__ in str(error.value)


def test_functions_and_schemas_are_tools_of_a_chat() -> None:
    with model_replying(CALL) as model:
        reply = model.chat([user("time?")], tools=[get_time])
        assert [(call.name, call.arguments) for call in reply.tool_calls] == [("get_time", {"city": "Oslo"})]
        assert "The time in a city." in model.render_chat([user("x")], tools=[get_time])
        both = [search, TOOLS[0]]
        assert model.chat([user("time?")], tools=both).tool_calls[0].name == "get_time"
        with pytest.raises(erllama.OptionError, match="a list of functions"):
            model.chat([user("time?")], tools=get_time)  # type: ignore[arg-type]


def test_a_run_calls_functions_until_a_reply_has_no_call() -> None:
    with model_replying(CALL, CALL.replace("Oslo", "Rome"), "Noon.") as model:
        messages = [user("time?")]
        run = model.run_tools(messages, [get_time])
        assert (run.text, run.turns, len(messages)) == ("Noon.", 3, 1)
        assert [message["role"] for message in run.messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
        first, second = run.results
        assert (first.value, first.content, first.error) == ("noon in Oslo", "noon in Oslo", None)
        assert second.content == "Error: ValueError: no such city"
        assert isinstance(second.error, ValueError)
        assert run.messages[4]["content"] == second.content


def test_a_run_ends_after_max_turns_without_running_the_last_calls() -> None:
    calls = []

    def get_time(city: str) -> dict[str, str]:
        calls.append(city)
        return {"city": city}

    with model_replying(CALL) as model:
        run = model.run_tools([user("time?")], [get_time], max_turns=2)
        assert (run.turns, calls, len(run.reply.tool_calls)) == (2, ["Oslo"], 1)
        assert run.results[0].content == '{"city": "Oslo"}'


def test_a_streamed_run_yields_the_events_and_the_results() -> None:
    with model_replying(CALL, "Noon.") as model:
        stream = model.stream_run_tools([user("time?")], [get_time])
        events = list(stream)
        done = [i for i, event in enumerate(events) if isinstance(event, erllama.Done)]
        results = [i for i, event in enumerate(events) if isinstance(event, erllama.ToolResult)]
        assert results == [done[0] + 1]
        assert done[1] == len(events) - 1
        assert "".join(event.text for event in events if isinstance(event, erllama.TextDelta)) == "Noon."
        assert stream.result().text == "Noon."
        with model.stream_run_tools([user("time?")], [get_time]) as stream:
            next(stream)
            stream.cancel()
            assert stream.result().reply.finish_reason == "cancelled"
        assert stream.result().results == ()


def test_a_run_in_asyncio_awaits_coroutine_functions() -> None:
    async def get_time(city: str) -> str:
        await asyncio.sleep(0)
        if city == "Rome":
            raise LookupError(city)
        return "noon"

    async def both(model: erllama.Model) -> None:
        run = await model.arun_tools([user("time?")], [get_time])
        assert (run.text, [result.content for result in run.results]) == (
            "Noon.",
            ["noon", "Error: LookupError: Rome"],
        )
        async with model.astream_run_tools([user("time?")], [get_time, search]) as stream:
            results = [event async for event in stream if isinstance(event, erllama.ToolResult)]
        assert [result.content for result in results] == ["noon", "Error: LookupError: Rome"]
        assert (await stream.result()).text == "Noon."
        sync = await model.arun_tools([user("time?")], [THREADED])
        assert sync.results[0].content == "noon in Oslo"

    with model_replying(CALL, CALL.replace("Oslo", "Rome"), "Noon.") as model:
        asyncio.run(both(model))
        with pytest.raises(erllama.OptionError, match="arun_tools"):
            model.run_tools([user("time?")], [get_time])


@pytest.mark.parametrize(
    ("tools", "problem"),
    [([], "a list of functions"), ([TOOLS[0]], "pass functions"), ([get_time, get_time], "two functions")],
)
def test_tools_that_cannot_be_run_are_refused(tools: Any, problem: str) -> None:  # noqa: ANN401
    with model_replying(CALL) as model, pytest.raises(erllama.OptionError, match=problem):
        model.run_tools([user("time?")], tools)
