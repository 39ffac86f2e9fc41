"""Python functions are tools: their schemas, their calls, and conversations that run them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
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
            # The model may have ended its reply before. No function runs in either case.
            assert stream.result().reply.finish_reason in ("cancelled", "tool_calls")
            assert not stream.result().results
        assert stream.result().results == ()


TWO_CALLS = CALL + CALL.replace("Oslo", "Rome")


@pytest.mark.parametrize("cancel_at", ["done", "first call", "first result"])
def test_a_cancelled_run_calls_no_further_function(cancel_at: str) -> None:
    cities: list[str] = []

    def get_time(city: str) -> str:
        cities.append(city)
        if cancel_at == "first call":
            stream.cancel()
        return "noon"

    with model_replying(TWO_CALLS, "Noon.") as model:
        stream = model.stream_run_tools([user("time?")], [get_time])
        for event in stream:
            if cancel_at == ("done" if isinstance(event, erllama.Done) else "first result") and (
                isinstance(event, erllama.Done | erllama.ToolResult)
            ):
                stream.cancel()
        run = stream.result()
        assert cities == ([] if cancel_at == "done" else ["Oslo"])
        assert (run.turns, len(run.reply.tool_calls), len(run.results)) == (1, 2, len(cities))


def test_a_run_cancelled_after_the_last_call_sends_no_request() -> None:
    with model_replying(CALL, "Noon.") as model:
        stream = model.stream_run_tools([user("time?")], [get_time])
        for event in stream:
            if isinstance(event, erllama.ToolResult):
                stream.cancel()
        assert (stream.result().turns, len(stream.result().results)) == (1, 1)


def test_a_cancellation_while_a_request_is_sent_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with model_replying(CALL, "Noon.") as model:
        stream_chat = erllama.Model.stream_chat

        def cancelled_meanwhile(self: erllama.Model, messages: Any, **options: Any) -> Any:  # noqa: ANN401
            new = stream_chat(self, messages, **options)
            if len(messages) > 1:
                stream.cancel()
            return new

        monkeypatch.setattr(erllama.Model, "stream_chat", cancelled_meanwhile)
        stream = model.stream_run_tools([user("time?")], [get_time])
        assert [event for event in stream if isinstance(event, erllama.ToolResult)]
        assert stream._stream._ticket.cancelled


def test_a_cancelled_run_in_asyncio_has_a_result() -> None:
    cities: list[str] = []

    async def get_time(city: str) -> str:
        cities.append(city)
        return "noon"

    async def cancel_early(model: erllama.Model) -> None:
        stream = model.astream_run_tools([user("time?")], [get_time])
        stream.cancel()
        run = await stream.result()
        assert (run.reply.finish_reason, run.results) == ("cancelled", ())

    async def cancel_at(model: erllama.Model, kind: type, n_called: int) -> None:
        cities.clear()
        stream = model.astream_run_tools([user("time?")], [get_time])
        async for event in stream:
            if isinstance(event, kind):
                stream.cancel()
        run = await stream.result()
        assert (len(cities), run.turns, len(run.results)) == (n_called, 1, n_called)

    async def lost(model: erllama.Model) -> None:
        stream = model.astream_run_tools([user("time?")], [get_time], max_tokens=-1)
        with pytest.raises(erllama.OptionError):
            await stream.result()
        with pytest.raises(erllama.Error, match="ended before its first reply did"):
            await stream.result()

    with model_replying(TWO_CALLS, "Noon.") as model:
        asyncio.run(cancel_early(model))
        asyncio.run(cancel_at(model, erllama.Done, 0))
        asyncio.run(cancel_at(model, erllama.ToolResult, 1))
        asyncio.run(lost(model))


class Clock:
    """The time in a city."""

    __name__ = "get_time"

    async def __call__(self, city: str) -> str:
        return f"noon in {city}"


def test_objects_and_functions_that_return_awaitables_are_awaited() -> None:
    def get_time(city: str) -> Awaitable[str]:
        return Clock()(city)

    async def both(model: erllama.Model) -> None:
        for tool in (Clock(), get_time):
            run = await model.arun_tools([user("time?")], [tool])
            assert run.results[0].value == "noon in Oslo"

    with model_replying(CALL, "Noon.") as model:
        asyncio.run(both(model))
        with pytest.raises(erllama.OptionError, match="get_time is a coroutine function; use arun_tools"):
            model.run_tools([user("time?")], [Clock()])


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
