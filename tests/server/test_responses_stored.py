"""Stored responses: continuing, reading and deleting them, their bounds, and who may see them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

import erllama
from erllama.errors import OptionError
from erllama.server import ApiKey
from erllama.server.stored_responses import FILE_NAME, MissingResponseError, ResponseStore, StoredResponse
from support.chat.scripted_model import model_replying
from support.http_server import running_server
from support.responses_server import CALL, GET_TIME, client_of, client_of_replies, n_computed, n_new, new_client

MODEL = "any"


def stored(id: str, previous: str | None = None, text: str = "hi", owner: str = "") -> StoredResponse:
    return StoredResponse(id, owner, previous, [{"role": "user", "content": text}], {"id": id, "output": []})


@pytest.fixture
def store() -> Iterator[ResponseStore]:
    store = ResponseStore(3)
    yield store
    store.close()


# --- Over HTTP -------------------------------------------------------------------------------


def test_a_response_continues_the_one_it_names() -> None:
    with client_of_replies(CALL, "late", "bye") as client:
        first = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME])
        second = client.responses.create(
            model=MODEL,
            previous_response_id=first.id,
            input=[
                {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "23:00"}  # type: ignore[union-attr]
            ],
            tools=[GET_TIME],
        )
        third = client.responses.create(
            model=MODEL, previous_response_id=second.id, input="thanks", tools=[GET_TIME]
        )
    assert (second.output_text, third.output_text) == ("late", "bye")
    assert third.previous_response_id == second.id
    assert n_computed(second) <= n_new(second, first) + 2
    assert n_computed(third) <= n_new(third, second) + 2


def test_instructions_are_not_carried_over() -> None:
    with client_of_replies("hello") as client:
        first = client.responses.create(model=MODEL, instructions="x" * 500, input="hello")
        second = client.responses.create(model=MODEL, previous_response_id=first.id, input="hello")
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens < 500 < first.usage.input_tokens


def test_a_stored_response_is_returned_as_it_was() -> None:
    with client_of_replies("hello") as client:
        for stream in (False, True):
            answer = client.responses.create(model=MODEL, input="hello", stream=stream)  # type: ignore[call-overload]
            response = list(answer)[-1].response if stream else answer
            found = client.responses.retrieve(response.id)
            assert found.output_text == "hello"
            assert found.to_dict() | {"timings": None} == response.to_dict() | {"timings": None}


def test_a_deleted_response_is_gone() -> None:
    with client_of_replies("hello") as client:
        response = client.responses.create(model=MODEL, input="hello")
        client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(response.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=MODEL, input="hello", previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"


def test_store_false_keeps_nothing(tmp_path: Path) -> None:
    with client_of_replies("hello", state_dir=tmp_path) as client:
        response = client.responses.create(model=MODEL, input="a secret", store=False)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
    assert b"secret" not in (tmp_path / FILE_NAME).read_bytes()


def test_no_response_is_stored_with_a_limit_of_zero() -> None:
    with client_of_replies("hello", max_stored_responses=0) as client:
        response = client.responses.create(model=MODEL, input="hello")
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_input_items_lists_the_whole_conversation() -> None:
    with client_of_replies(f"<think>hm</think>{CALL}", "late") as client:
        first = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME])
        output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "23:00"}  # type: ignore[union-attr]
        second = client.responses.create(
            model=MODEL,
            previous_response_id=first.id,
            input=[output, {"role": "developer", "content": "be brief"}],  # type: ignore[list-item]
            tools=[GET_TIME],
        )
        listed = list(client.responses.input_items.list(second.id, order="asc", limit=2))
        newest = client.responses.input_items.list(second.id, limit=1)
        with pytest.raises(openai.BadRequestError):
            client.responses.input_items.list(second.id, limit=1000)
    kinds = ["message", "reasoning", "function_call", "function_call_output", "message"]
    assert [item.type for item in listed] == kinds
    assert len({item.id for item in listed}) == len(kinds)
    assert [item.id for item in newest.data] == [listed[-1].id]
    assert newest.has_more


def test_item_references_stand_for_stored_items() -> None:
    with client_of_replies(CALL, "late") as client:
        first = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME])
        call = first.output[0]
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "23:00"}  # type: ignore[union-attr]
        items = [{"role": "user", "content": "time?"}, {"type": "item_reference", "id": call.id}, output]
        second = client.responses.create(model=MODEL, input=items, tools=[GET_TIME])  # type: ignore[arg-type]
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model=MODEL, input=[{"type": "item_reference", "id": "msg_0_0"}])
    assert second.output_text == "late"


def test_responses_survive_a_restart_with_a_directory(tmp_path: Path) -> None:
    with client_of_replies("hello", state_dir=tmp_path) as client:
        first = client.responses.create(model=MODEL, input="hello")
    with client_of_replies("hello", "bye", state_dir=tmp_path) as client:
        assert client.responses.retrieve(first.id).output_text == "hello"
        second = client.responses.create(model=MODEL, input="bye", previous_response_id=first.id)
    assert second.output_text == "bye"


def test_responses_are_in_the_directory_of_the_cache_by_default(tmp_path: Path) -> None:
    for expected in ("hello", "bye"):
        with erllama.Cache(disk=tmp_path) as cache:
            with client_of(model_replying("hello", "bye", cache=cache)) as client:
                if expected == "hello":
                    id = client.responses.create(model=MODEL, input="hello").id
                else:
                    again = client.responses.create(model=MODEL, input="bye", previous_response_id=id)
                    assert again.output_text == "bye"
    assert (tmp_path / FILE_NAME).exists()


def test_a_key_does_not_see_responses_of_another() -> None:
    keys = (ApiKey(secret="a", name="a"), ApiKey(secret="b", name="b"))
    with model_replying("hello") as model, running_server(model, keys=keys) as server:
        with new_client(server.url, "a") as mine, new_client(server.url, "b") as other:
            response = mine.responses.create(model=MODEL, input="hello")
            assert mine.responses.retrieve(response.id).id == response.id
            for look in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    look(response.id)
            with pytest.raises(openai.BadRequestError):
                other.responses.create(model=MODEL, input="hello", previous_response_id=response.id)


# --- The store -------------------------------------------------------------------------------


def test_the_least_recently_used_response_is_removed(store: ResponseStore) -> None:
    for id in "abc":
        store.save(stored(id))
    store.get("a", "")
    store.save(stored("d"))
    assert store.get("a", "").id == "a"
    with pytest.raises(MissingResponseError):
        store.get("b", "")


def test_a_long_conversation_counts_as_used_as_a_whole(store: ResponseStore) -> None:
    store.save(stored("a"))
    store.save(stored("b", "a"))
    store.save(stored("other"))
    assert [each.id for each in store.conversation("b", "")] == ["a", "b"]
    store.save(stored("new"))
    assert [each.id for each in store.conversation("b", "")] == ["a", "b"]


def test_a_conversation_with_a_deleted_part_is_missing(store: ResponseStore) -> None:
    store.save(stored("a"))
    store.save(stored("b", "a"))
    store.delete("a", "")
    with pytest.raises(MissingResponseError) as caught:
        store.conversation("b", "")
    assert caught.value.id == "a"


def test_the_store_is_bounded_in_bytes() -> None:
    store = ResponseStore(100, max_bytes=1000)
    for n in range(10):
        store.save(stored(str(n), text="x" * 200))
    kept = 0
    for n in range(10):
        try:
            store.get(str(n), "")
            kept += 1
        except MissingResponseError:
            assert not kept
    assert 1 <= kept <= 4
    store.save(stored("large", text="x" * 2000))
    with pytest.raises(MissingResponseError):
        store.get("large", "")
    assert store.get("9", "").id == "9"
    store.close()


def test_a_lower_limit_applies_to_a_database_that_exists(tmp_path: Path) -> None:
    store = ResponseStore(3, tmp_path)
    for id in "abc":
        store.save(stored(id))
    store.close()
    store = ResponseStore(1, tmp_path)
    assert store.get("c", "").id == "c"
    with pytest.raises(MissingResponseError):
        store.get("b", "")
    store.close()


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    store = ResponseStore(3, directory)
    store.save(stored("a"))
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.close()


def test_a_deleted_prompt_is_not_in_the_file(tmp_path: Path) -> None:
    store = ResponseStore(3, tmp_path)
    store.save(stored("a", text="a secret"))
    assert b"a secret" in (tmp_path / FILE_NAME).read_bytes()
    store.delete("a", "")
    store.close()
    assert all(b"a secret" not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 100)
    with pytest.raises(OptionError, match="state_dir"):
        ResponseStore(3, tmp_path)
