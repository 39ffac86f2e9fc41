"""When models are loaded and unloaded: on request, after a while, for others, and by a new configuration."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

import erllama
from erllama.engine.backends.memory_estimate import MemoryEstimate
from erllama.errors import OptionError
from erllama.server.conduct.durations import FOREVER, parse_duration
from erllama.server.conduct.errors import ApiError
from erllama.server.models import ModelEntry, ModelPool
from support.model_pools import StubPool, stub_entry

# --- loading -------------------------------------------------------------------------------------


def test_concurrent_first_requests_load_a_model_once() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        models = await asyncio.gather(*(stubs.use("a") for _ in range(8)))
        assert len({id(model) for model in models}) == 1
        assert models[0].complete([1, 2], max_tokens=2).n_prompt == 2
        assert stubs.states() == {"a": "loaded", "b": "unloaded"}

    stubs.run(test)
    assert stubs.n_loads == {"a": 1}


def test_a_client_that_leaves_does_not_abort_a_load_that_others_await() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        stubs.may_load.clear()
        first, second = asyncio.create_task(stubs.use("a")), asyncio.create_task(stubs.use("a"))
        await stubs.until(lambda: stubs.n_loads["a"] == 1)
        first.cancel()
        await asyncio.sleep(0)
        assert stubs["a"].state == "loading"
        stubs.may_load.set()
        assert (await second).id == "a"
        assert stubs["a"].n_running == 1

    stubs.run(test)
    assert stubs.n_loads == {"a": 1}


def test_a_load_goes_on_if_all_clients_leave_and_the_model_is_idle_then() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        stubs.may_load.clear()
        request = asyncio.create_task(stubs.use("a"))
        await stubs.until(lambda: stubs.n_loads["a"] == 1)
        request.cancel()
        stubs.may_load.set()
        await stubs.until(lambda: stubs["a"].state == "loaded")
        assert stubs["a"].n_running == 0
        assert not stubs["a"].waiters

    stubs.run(test)


def test_a_failed_load_fails_its_requests_and_the_next_one_tries_again() -> None:
    stubs = StubPool("a", "b")
    stubs.faults["a"] = erllama.ModelLoadError("a.gguf is damaged")

    async def test() -> None:
        await stubs.use("b")
        results = await asyncio.gather(stubs.use("a"), stubs.use("a"), return_exceptions=True)
        assert [(type(each), str(each)) for each in results] == [
            (ApiError, "the model 'a' cannot be loaded: a.gguf is damaged")
        ] * 2
        assert results[0] is not results[1]  # each has the id of its request
        assert (stubs["a"].state, stubs["a"].error, stubs["a"].n_bytes) == ("unloaded", "a.gguf is damaged", 0)
        assert (await stubs.use("a")).id == "a"
        assert stubs["a"].error == ""

    stubs.run(test)
    assert stubs.pool.lifecycle.load_failures == {"a": 1}


def test_a_model_that_has_failed_is_loaded_again() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        await stubs.touch("a")
        model = await stubs.use("a")
        model.unload()  # as its process does that ended too often
        request = asyncio.create_task(stubs.use("a"))
        await asyncio.sleep(0.02)
        assert not request.done()
        stubs.pool.release(stubs["a"])
        assert (await request).complete([1], max_tokens=1).tokens

    stubs.run(test)
    assert stubs.unloads() == {("a", "failed"): 1}


def test_a_load_in_progress_ends_when_the_server_stops() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        stubs.may_load.clear()
        request = asyncio.create_task(stubs.use("a"))
        await stubs.until(lambda: stubs.n_loads["a"] == 1)
        stubs.pool.cancel_loads()
        with pytest.raises(ApiError, match="cancelled"):
            await request

    stubs.run(test)
    assert erllama.list_models() == []


def test_models_that_the_server_did_not_load_stay_loaded() -> None:
    async def test(model: erllama.Model) -> None:
        from erllama.server import ServedModel

        pool = ModelPool([ServedModel(model)])
        pool.start()
        (found,) = pool.models
        await pool.use(found, keep_alive=0)
        pool.release(found)
        assert (found.state, found.keep_alive) == ("loaded", FOREVER)
        with pytest.raises(ApiError, match="was not loaded by the server"):
            pool.unload(found)
        pool.close()
        assert model.complete([1], max_tokens=1).tokens

    from erllama.engine.backends.stub import StubBackend

    with erllama.Cache() as cache, erllama.load_backend(StubBackend(), cache=cache) as model:
        asyncio.run(test(model))


# --- keep_alive ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0), (90, 90), (1.5, 1.5), (-1, FOREVER), ("0", 0), ("300ms", 0.3), ("5m", 300), ("1h30m", 5400)],
)
def test_durations_are_seconds_or_texts(value: object, seconds: float) -> None:
    assert parse_duration("keep_alive", value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["-1", "-1m", "forever", -0.5, float("inf")])
def test_a_negative_duration_is_for_ever(value: object) -> None:
    assert parse_duration("keep_alive", value) == FOREVER


@pytest.mark.parametrize("value", ["", "m", "5 parsecs", "5m!", True, None, [5], float("nan"), "1m-"])
def test_other_durations_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match="keep_alive="):
        parse_duration("keep_alive", value)


def test_an_idle_model_is_unloaded_after_its_time_and_not_while_in_use() -> None:
    stubs = StubPool(stub_entry("a", keep_alive=0.05), "b")

    async def test() -> None:
        await stubs.use("a")
        await stubs.touch("b")
        await asyncio.sleep(0.2)
        assert stubs.states() == {"a": "loaded", "b": "loaded"}
        assert stubs["a"].expires_in is None
        stubs.pool.release(stubs["a"])
        assert stubs["a"].expires_in is not None
        await stubs.until(lambda: stubs["a"].state == "unloaded")
        assert stubs["b"].state == "loaded"

    stubs.run(test)
    assert stubs.unloads() == {("a", "keep_alive"): 1}


def test_a_request_sets_the_keep_alive_of_its_model_until_it_is_unloaded() -> None:
    stubs = StubPool(stub_entry("a", keep_alive="1h"), "b")

    async def test() -> None:
        for keep_alive, expected in ((7200.0, 7200.0), (None, 7200.0), (FOREVER, FOREVER)):
            await stubs.pool.use(stubs["a"], keep_alive)
            stubs.pool.release(stubs["a"])
            assert stubs["a"].keep_alive == expected
        await stubs.use("a", keep_alive=0.0)
        await stubs.use("a")
        stubs.pool.release(stubs["a"])
        assert stubs["a"].state == "loaded"
        stubs.pool.release(stubs["a"])
        await stubs.until(lambda: stubs["a"].state == "unloaded")
        assert stubs["a"].keep_alive == 3600

    stubs.run(test)


# --- memory --------------------------------------------------------------------------------------


def test_the_least_recently_used_idle_model_makes_room() -> None:
    stubs = StubPool("a", "b", "c")

    async def test() -> None:
        for name in ("a", "b", "a", "c"):
            await stubs.touch(name)
        assert stubs.states() == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        await stubs.use("a")
        await stubs.touch("b")  # a is in use
        assert stubs.states() == {"a": "loaded", "b": "loaded", "c": "unloaded"}

    stubs.run(test)
    assert stubs.unloads() == {("b", "memory"): 1, ("c", "memory"): 1}


def test_a_large_model_takes_the_room_of_several() -> None:
    stubs = StubPool("a", "b", stub_entry("c", n_bytes=20))

    async def test() -> None:
        await stubs.touch("a")
        await stubs.touch("b")
        await stubs.touch("c")
        assert stubs.states() == {"a": "unloaded", "b": "unloaded", "c": "loaded"}

    stubs.run(test)


def test_a_model_waits_for_busy_ones_and_their_next_requests_wait_for_it() -> None:
    stubs = StubPool("a", "b", memory_limit=10)

    async def test() -> None:
        used = await stubs.use("a")
        for_b = asyncio.create_task(stubs.use("b"))
        await stubs.until(lambda: stubs["a"].unload_reason == "memory")
        for_a = asyncio.create_task(stubs.use("a"))
        await asyncio.sleep(0.05)
        assert not for_b.done()
        assert not for_a.done()
        assert used.complete([1], max_tokens=1).tokens  # in use, so it is not unloaded
        stubs.pool.release(stubs["a"])
        await for_b
        assert stubs["a"].state in ("unloaded", "loading")
        stubs.pool.release(stubs["b"])
        await for_a
        assert stubs.states() == {"a": "loaded", "b": "unloaded"}

    stubs.run(test)
    assert stubs.n_loads == {"a": 2, "b": 1}


def test_a_model_that_stays_busy_keeps_its_place_and_the_other_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stubs = StubPool("a", "b", memory_limit=15, memory_wait=0.05)

    async def test() -> None:
        await stubs.use("a")
        with pytest.raises(ApiError) as refused:
            await stubs.use("b")
        assert (refused.value.kind, refused.value.code) == ("unavailable", "memory_in_use")
        assert refused.value.retry_after
        assert "'a'" not in refused.value.message, "a client may not know of all models"
        assert "'a'" in caplog.text
        await stubs.use("a")  # which takes requests again
        stubs.pool.release(stubs["a"])
        stubs.pool.release(stubs["a"])
        await stubs.use("b")

    stubs.run(test)


def test_idle_models_make_room_for_a_request_that_does_not_wait() -> None:
    stubs = StubPool("a", "b", memory_limit=10, memory_wait=0.0)

    async def test() -> None:
        for name in "abab":
            await stubs.touch(name)
        await stubs.use("b")
        with pytest.raises(ApiError, match="try again once these are idle"):
            await stubs.use("a")

    stubs.run(test)


def test_a_model_larger_than_the_limit_is_refused_at_once() -> None:
    stubs = StubPool("a", stub_entry("b", n_bytes=30 << 20), memory_limit=20 << 20)

    async def test() -> None:
        await stubs.touch("a")
        with pytest.raises(ApiError) as refused:
            await stubs.use("b")
        error = refused.value
        assert (error.code, error.retry_after) == ("model_too_large", None)
        assert "30.0 MiB" in error.message
        assert "20.0 MiB" in error.message
        assert stubs.states() == {"a": "loaded", "b": "unloaded"}

    stubs.run(test)
    assert stubs.n_loads == {"a": 1}


def test_nothing_makes_room_for_requests_that_have_left() -> None:
    stubs = StubPool("a", "b", memory_limit=10)

    async def test() -> None:
        await stubs.use("a")
        request = asyncio.create_task(stubs.use("b"))
        await stubs.until(lambda: stubs["a"].unload_reason == "memory")
        request.cancel()
        await stubs.until(lambda: stubs["b"].state == "unloaded")
        assert stubs["a"].is_ready
        await stubs.use("a")

    stubs.run(test)
    assert stubs.n_loads == {"a": 1}


def test_a_client_that_leaves_before_there_is_room_evicts_nothing() -> None:
    stubs = StubPool("a", stub_entry("b", n_bytes=15))
    estimate, may_estimate = stubs.pool.lifecycle._estimate, threading.Event()

    def slow(entry: ModelEntry) -> MemoryEstimate:
        assert may_estimate.wait(60)
        return estimate(entry)

    async def test() -> None:
        await stubs.touch("a")
        stubs.pool.lifecycle._estimate = slow
        request = asyncio.create_task(stubs.use("b"))
        await stubs.until(lambda: stubs["b"].state == "loading")
        request.cancel()
        await asyncio.sleep(0.01)
        may_estimate.set()
        await stubs.until(lambda: stubs["b"].state == "unloaded")
        assert stubs.states() == {"a": "loaded", "b": "unloaded"}

    stubs.run(test)
    assert stubs.n_loads == {"a": 1}


def test_under_pressure_the_least_recently_used_idle_model_goes() -> None:
    stubs = StubPool("a", "b", "c", memory_limit=30)

    async def test() -> None:
        await stubs.use("a")
        await stubs.touch("b")
        await stubs.touch("c")
        for name in ("b", "c"):
            stubs.pool.lifecycle.unload_least_recent()
            await stubs.until(lambda name=name: stubs[name].state == "unloaded")
        stubs.pool.lifecycle.unload_least_recent()
        assert stubs.states() == {"a": "loaded", "b": "unloaded", "c": "unloaded"}

    stubs.run(test)
    assert stubs.unloads() == {("b", "pressure"): 1, ("c", "pressure"): 1}


def test_models_that_do_not_fit_together_at_the_start_are_refused() -> None:
    stubs = StubPool(stub_entry("a", load="start"), stub_entry("b", load="start", n_bytes=11))
    with pytest.raises(erllama.MemoryLimitExceeded, match="'b' needs about") as refused:
        stubs.pool.load_at_start()
    assert (refused.value.n_bytes, refused.value.limit) == (11, 20)
    stubs.pool.close()
    assert erllama.list_models() == []


def test_many_requests_to_more_models_than_fit_are_all_answered() -> None:
    stubs = StubPool("a", "b", "c", "d", memory_limit=25)

    async def client(seed: int) -> None:
        names = random.Random(seed)
        for _ in range(15):
            name = names.choice("abcd")
            model = await stubs.use(name)
            assert model.id == name
            await model.acomplete([1, 2, 3 + seed], max_tokens=2)
            stubs.pool.release(stubs[name])

    async def test() -> None:
        await asyncio.gather(*map(client, range(8)))
        assert all(each.n_running == 0 for each in stubs.pool.models)
        assert stubs.pool.lifecycle.room.used <= 25

    stubs.run(test)
    assert stubs.pool.lifecycle.loads.total() > 8


# --- a new configuration -------------------------------------------------------------------------


def test_unchanged_models_stay_loaded_and_take_new_aliases_and_times() -> None:
    stubs = StubPool("a", stub_entry("b", n_ctx=256))

    async def test() -> None:
        models = [await stubs.use("a"), await stubs.use("b")]
        changes = stubs.pool.reconfigure(
            [stub_entry("b", ["gpt"], n_ctx=256, keep_alive=60), stub_entry("a"), stub_entry("c")]
        )
        assert changes == (("c",), (), ())
        assert [await stubs.use("a"), await stubs.use("b")] == models
        assert stubs.pool.find("gpt", stubs.pool.models).name == "b"
        assert stubs["b"].keep_alive == 60
        assert [each.name for each in stubs.pool.models] == ["b", "a", "c"]

    stubs.run(test)
    assert stubs.n_loads == {"a": 1, "b": 1}


def test_removed_models_finish_their_requests_and_are_unloaded() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        removed = stubs["a"]
        model = await stubs.use("a")
        await stubs.touch("b")
        assert stubs.pool.reconfigure([stub_entry("b")]) == ((), ("a",), ())
        assert stubs.pool.find("a", stubs.pool.models) is stubs["b"]  # a single model answers under any name
        assert model.complete([1], max_tokens=1).tokens
        stubs.pool.release(removed)
        await stubs.until(lambda: removed not in stubs.pool.lifecycle.known)
        assert [each.id for each in erllama.list_models()] == ["b"]

    stubs.run(test)


def test_a_model_with_other_options_is_loaded_again_once_it_is_idle() -> None:
    stubs = StubPool("a", "b", memory_limit=40)

    async def test() -> None:
        before, model = stubs["a"], await stubs.use("a")
        assert stubs.pool.reconfigure([stub_entry("a", n_bytes=15), stub_entry("b")]) == ((), (), ("a",))
        request = asyncio.create_task(stubs.use("a"))
        await asyncio.sleep(0.05)
        assert not request.done()  # the old one has the name
        assert model.complete([1], max_tokens=1).tokens
        stubs.pool.release(before)
        assert await request is not model
        assert stubs["a"].n_bytes == 15

    stubs.run(test)


def test_a_model_changed_twice_while_in_use_is_loaded_once_at_a_time() -> None:
    stubs = StubPool("a")

    async def test() -> None:
        await stubs.use("a")
        configured, requests = [stubs["a"]], []
        for n_bytes in (9, 8):
            stubs.pool.reconfigure([stub_entry("a", n_bytes=n_bytes)])
            configured.append(stubs["a"])
            requests.append(asyncio.create_task(stubs.use("a")))
            await asyncio.sleep(0.01)
        assert stubs.n_loads == {"a": 1}
        for model, request in zip(configured, requests, strict=False):
            stubs.pool.release(model)
            assert (await request).id == "a"
        stubs.pool.release(configured[-1])

    stubs.run(test)
    assert stubs.n_loads == {"a": 3}


def test_a_model_that_now_loads_at_the_start_is_loaded() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        stubs.pool.reconfigure([stub_entry("a", load="start"), stub_entry("b")])
        await stubs.until(lambda: stubs["a"].state == "loaded")

    stubs.run(test)
    assert stubs.n_loads == {"a": 1}


def test_new_models_are_loaded_in_the_background_if_they_load_at_the_start() -> None:
    stubs = StubPool("a")

    async def test() -> None:
        stubs.pool.reconfigure([stub_entry("a"), stub_entry("b", load="start"), stub_entry("c")])
        await stubs.until(lambda: stubs["b"].state == "loaded")
        assert stubs.states() == {"a": "unloaded", "b": "loaded", "c": "unloaded"}

    stubs.run(test)


def test_a_model_that_is_removed_while_it_loads_serves_those_that_wait() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        removed = stubs["a"]
        stubs.may_load.clear()
        request = asyncio.create_task(stubs.use("a"))
        await stubs.until(lambda: stubs.n_loads["a"] == 1)
        stubs.pool.reconfigure([stub_entry("b")])
        stubs.may_load.set()
        model = await request
        assert model.complete([1], max_tokens=1).tokens
        stubs.pool.release(removed)
        await stubs.until(lambda: erllama.list_models() == [])
        assert removed not in stubs.pool.lifecycle.known

    stubs.run(test)


def test_a_wrong_configuration_changes_nothing() -> None:
    stubs = StubPool("a", "b")

    async def test() -> None:
        before = list(stubs.pool.models)
        for entries in ([], [stub_entry("a"), stub_entry("c", ["a"])], [stub_entry("d"), stub_entry("d")]):
            with pytest.raises(OptionError):
                stubs.pool.reconfigure(entries)
        assert list(stubs.pool.models) == before
        await stubs.touch("a")

    stubs.run(test)
