"""A model's process ends at any moment, in any way: replies continue as if it had not.

ERLLAMA_DEATHS says how many processes end; `make stress`: 200.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

import erllama
from erllama.engine import Completion, Event
from support.deadly_backend import DEATHS, POISON, DeadlyStub
from support.model_processes import model_processes
from support.threads import in_threads, wait_until

N_DEATHS = int(os.environ.get("ERLLAMA_DEATHS", "8"))
N_STREAMS = 8
OPTIONS: dict[str, object] = {"n_ctx": 8192, "n_batch": 256, "n_ubatch": 64, "n_sequences": 16, "end_bias": 0.0}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 30}}}


@contextmanager
def deadly(orders: Path | None, cache: erllama.Cache, **options: object) -> Iterator[erllama.Model]:
    """A model in a process that dies on order."""
    # A busy machine may leave a process without a core for seconds: that is a hang only where one is ordered.
    process: dict[str, object] = {"max_restarts": 1000, "hang_timeout": 3.0 if orders else 120.0}
    process |= options.pop("process", {})  # type: ignore[operator]
    arguments = {**OPTIONS, "orders": None if orders is None else str(orders), **options}
    with erllama.load_backend(
        "support.deadly_backend:make", arguments, cache=cache, n_seq_max=N_STREAMS, process=process
    ) as model:
        yield model


def all_have_moved(model: erllama.Model) -> bool:
    """Whether every running request has a new token since the last death."""
    table = model._runner._table  # type: ignore[attr-defined]
    return len(table) > 0 and all(request.deaths == 0 and request.has_tokens for request in table.all())


Seen = dict[int, tuple[list[object], dict[str, object], int]]
Start = Callable[[erllama.Model, int], "erllama.Stream | erllama.ChatStream"]

# Each kind of reply, with state that must survive.
KINDS: dict[str, Start] = {
    "plain": lambda model, n: model.stream(f"plain {n}", max_tokens=60, temperature=0, seed=1),
    "drawn": lambda model, n: model.stream(f"drawn {n}", max_tokens=60, seed=n),
    "mirostat": lambda model, n: model.stream(f"mirostat {n}", max_tokens=60, seed=n, mirostat=2),
    "penalties": lambda model, n: model.stream(
        f"penalties {n}", max_tokens=60, seed=n, repeat_penalty=1.3, xtc_probability=0.5, dry_multiplier=0.8
    ),
    "stops": lambda model, n: model.stream(f"stops {n}", max_tokens=60, seed=n, stop=["ab ab", 'é"é', "tt}"]),
    "logprobs": lambda model, n: model.stream(f"logprobs {n}", max_tokens=60, seed=n, logprobs=3),
    "grammar": lambda model, n: model.stream(f"grammar {n}", max_tokens=60, seed=n, json_schema=SCHEMA),
    "thinking": lambda model, n: model.stream(
        f"thinking {n}",
        max_tokens=60,
        seed=n,
        thinking="enabled",
        thinking_markers=("<t>", "</t>"),
        thinking_budget_tokens=12,
        thinking_signing_key=b"key",
    ),
    "calls": lambda model, n: model.stream(
        f"calls {n}", max_tokens=60, seed=n, tool_markers=("<c>", "</c>"), tool_payload_markers=("{", "}")
    ),
    "chat": lambda model, n: model.stream_chat(
        [{"role": "user", "content": f"chat {n}"}],
        max_tokens=60,
        seed=n,
        thinking="enabled",
        thinking_markers=("<t>", "</t>"),
    ),
    "speculation": lambda model, n: model.stream(
        f"ab ab {n}", max_tokens=60, temperature=0, seed=1, speculative="ngram"
    ),
    "reproducible": lambda model, n: model.stream(f"same {n}", max_tokens=60, seed=n, reproducible=True),
}


def summary(events: list[Event]) -> list[object]:
    """A stream without the limits of its pieces: what a reader has seen at the end."""
    found: list[object] = []
    for event in events:
        kind = type(event).__name__
        if isinstance(event, erllama.Done):
            continue
        if kind.endswith("Delta"):
            text, tokens, logprobs = event.text, event.tokens, event.logprobs  # type: ignore[union-attr]
            last = found[-1] if found else None
            if isinstance(last, list) and last[0] == kind:
                last[1:] = [last[1] + text, last[2] + tokens, last[3] + logprobs]
            else:
                found.append([kind, text, tokens, logprobs])
        else:
            found.append(event)
    return found


def essence(reply: Completion | erllama.ChatCompletion) -> dict[str, object]:
    """What does not depend on times and on the cache."""
    names = (
        *("text", "tokens", "finish_reason", "seed", "stop_sequence", "stop_token", "logprobs", "thinking"),
        *("thinking_signature", "raw_tool_calls", "sampling_state"),
    )
    completion = reply
    return {name: getattr(completion, name) for name in names if hasattr(completion, name)}


def undisturbed(kinds: list[str]) -> dict[tuple[str, int], tuple[list[object], dict[str, object]]]:
    """The streams and replies of a model in this process."""
    found = {}
    with (
        erllama.Cache() as cache,
        erllama.load_backend(DeadlyStub(**OPTIONS), cache=cache, n_seq_max=N_STREAMS) as model,  # type: ignore[arg-type]
    ):
        for n, kind in enumerate(kinds):
            stream = KINDS[kind](model, n)
            found[kind, n] = summary(list(stream)), essence(stream.result())
    return found


@pytest.mark.parametrize("first", [0, 4])
def test_replies_survive_every_kind_of_death(tmp_path: Path, first: int) -> None:
    kinds = (list(KINDS) * 2)[first : first + N_STREAMS]
    expected = undisturbed(kinds)
    dice = random.Random(first)
    orders = tmp_path / "orders"
    n_deaths = 0
    with (
        erllama.Cache(ram=None, ram_file=tmp_path / "blocks", block_size=16) as cache,
        deadly(orders, cache, slow=0.002) as model,
    ):
        n_handles, n_bytes = psutil.Process().num_fds(), 0
        while n_deaths < N_DEATHS / 2:
            seen: Seen = {}

            def read(n: int, seen: Seen = seen) -> None:
                stream = KINDS[kinds[n]](model, n)
                events = list(stream)
                reply = stream.result()
                seen[n] = summary(events), essence(reply), reply.restarts

            readers = threading.Thread(target=in_threads, args=(read, N_STREAMS))
            before = model.restarts
            readers.start()
            while readers.is_alive() and n_deaths < N_DEATHS / 2:
                # A request that dies twice without a new token between would count as the cause.
                while readers.is_alive() and not (model.info.pid and all_have_moved(model)):
                    time.sleep(0.002)
                time.sleep(dice.uniform(0.0, 0.05))
                restarts = model.restarts
                orders.write_text(DEATHS[(first + n_deaths) % len(DEATHS)])
                n_deaths += 1
                while readers.is_alive() and model.restarts == restarts:
                    time.sleep(0.002)
            readers.join()
            orders.unlink(missing_ok=True)
            for n, kind in enumerate(kinds):
                events, reply, _ = seen[n]
                assert reply == expected[kind, n][1], kind
                assert events == expected[kind, n][0], kind
            assert max(restarts for *_, restarts in seen.values()) <= model.restarts - before
            n_bytes = n_bytes or psutil.Process().memory_info().rss  # after the first round
        assert len(model_processes()) == 1
        assert psutil.Process().num_fds() <= n_handles + 4
        assert psutil.Process().memory_info().rss < n_bytes + (64 << 20)
    assert not model_processes()


def test_a_request_that_kills_twice_fails_and_the_others_complete(tmp_path: Path) -> None:
    results: dict[int, object] = {}
    with erllama.Cache(ram=None, ram_file=tmp_path) as cache, deadly(None, cache, poisoned=True) as model:

        def run(n: int) -> None:
            prompt = [POISON, 65] if n == 3 else [66, 67, 70 + n]
            try:
                results[n] = model.complete(prompt, max_tokens=40, seed=n)
            except erllama.Error as error:
                results[n] = error

        in_threads(run, N_STREAMS)
        assert isinstance(results[3], erllama.RequestCrashed)
        others = [results[n] for n in range(N_STREAMS) if n != 3]
        assert all(isinstance(reply, Completion) for reply in others), others
        assert model.restarts == 2
        assert model.complete([66], max_tokens=3).restarts == 0


def test_a_model_that_dies_too_often_fails_with_its_last_output(tmp_path: Path) -> None:
    orders = tmp_path / "orders"
    with (
        erllama.Cache(ram=None, ram_file=tmp_path / "blocks") as cache,
        deadly(orders, cache, slow=0.01, process={"max_restarts": 2}) as model,
    ):
        stream = model.stream([65, 66], max_tokens=4000, temperature=0)

        def read() -> None:
            n_orders = 0
            for _ in stream:
                if n_orders == model.restarts and all_have_moved(model):
                    n_orders += 1
                    orders.write_text("segv")

        with pytest.raises(erllama.ModelFailed, match="max_restarts=2") as caught:
            read()
        assert "Segmentation fault" in str(caught.value)
        with pytest.raises(erllama.ModelFailed):
            model.complete([65], max_tokens=1)


def test_without_restarts_the_first_death_is_an_error(tmp_path: Path) -> None:
    orders = tmp_path / "orders"
    with (
        erllama.Cache(ram=None, ram_file=tmp_path / "blocks") as cache,
        deadly(orders, cache, process={"max_restarts": 0}) as model,
    ):
        orders.write_text("abort")
        with pytest.raises(erllama.ModelFailed, match="SIGABRT"):
            model.complete([65], max_tokens=4)
        assert model.restarts == 0


def test_a_process_with_too_much_memory_is_replaced(tmp_path: Path) -> None:
    orders = tmp_path / "orders"
    with (
        erllama.Cache(ram=None, ram_file=tmp_path / "blocks") as cache,
        deadly(orders, cache, slow=0.01, process={"memory_limit": "256MiB"}) as model,
    ):
        expected = model.complete([65], max_tokens=200, temperature=0)
        orders.write_text("leak")
        reply = model.complete([65], max_tokens=200, temperature=0)
        assert (reply.tokens, reply.restarts) == (expected.tokens, 1)


def test_what_a_process_prints_and_logs_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    orders = tmp_path / "orders"
    caplog.set_level("INFO", "erllama.process")
    with erllama.Cache(ram=None, ram_file=tmp_path / "blocks") as cache, deadly(orders, cache) as model:
        orders.write_text("print")
        model.complete([65], max_tokens=4)
        wait_until(lambda: "logged by the process" in caplog.text)
        assert model.restarts == 0
    found = {(record.name, record.levelname, record.getMessage().rpartition("] ")[2]) for record in caplog.records}
    assert ("erllama.process", "INFO", "printed by the process") in found
    assert ("erllama.engine", "WARNING", "logged by the process") in found


def test_what_a_process_saved_outlives_it(tmp_path: Path) -> None:
    orders = tmp_path / "orders"
    prompt = [65 + n % 20 for n in range(300)]
    with (
        erllama.Cache(ram=None, ram_file=tmp_path / "blocks", block_size=16) as cache,
        deadly(orders, cache) as model,
    ):
        cold = model.complete(prompt, max_tokens=4, temperature=0)
        assert cold.cache.kind == "cold"
        assert cache.flush()
        orders.write_text("kill")
        warm = model.complete(prompt, max_tokens=4, temperature=0)
        assert (warm.tokens, warm.restarts) == (cold.tokens, 1)
        assert warm.cache.tokens >= 288
        assert model.metrics.finished == {"length": 2}
        assert cache.counters()["saves_cold"] >= 1


def test_a_process_whose_model_thread_cannot_continue_is_replaced(tmp_path: Path) -> None:
    orders = tmp_path / "orders"
    with (
        erllama.Cache(ram=None, ram_file=tmp_path / "blocks") as cache,
        deadly(orders, cache) as model,
    ):
        expected = model.complete([65], max_tokens=5, temperature=0)
        orders.write_text("broken")
        with suppress(erllama.Error):
            model.complete([65], max_tokens=5, temperature=0)
        wait_until(lambda: model.restarts and model.info.pid)
        assert model.complete([65], max_tokens=5, temperature=0).tokens == expected.tokens


def test_a_process_that_stops_while_it_loads_is_replaced(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with (
        erllama.Cache(ram=None, ram_file=tmp_path / "blocks") as cache,
        deadly(None, cache, hold=str(hold), process={"hang_timeout": 1.0}) as model,
    ):
        expected = model.complete([65], max_tokens=5, temperature=0)
        first = model.info.pid
        hold.touch()
        os.kill(first, 9)
        wait_until(lambda: [child for child in model_processes() if child.pid != first])
        second = next(child for child in model_processes() if child.pid != first)
        wait_until(lambda: second.num_threads() > 3)  # those of the cache, and one that sends signs of life
        time.sleep(1)
        second.suspend()
        hold.unlink()
        assert model.complete([65], max_tokens=5, temperature=0).tokens == expected.tokens
        assert model.restarts >= 2
