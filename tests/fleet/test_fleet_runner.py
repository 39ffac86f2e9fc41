"""The ingress of a fleet, with replicas in this process: replies, moves, kills, refusals and cancellations."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

import erllama
from erllama.fleet import runner as runner_module
from erllama.fleet.config import FleetConfig
from erllama.fleet.ingress import open_ingress
from erllama.fleet.prefix_index import PrefixIndex
from erllama.fleet.prefix_router import PrefixRouter
from erllama.fleet.replica import Replica
from erllama.fleet.runner import FleetRunner
from erllama.fleet.transport import Received, ReplicaLost, WirePrefix

OPTIONS = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "n_seq_max": 4, "fingerprint": "gguf_chunked"}


class LocalCalls:
    """`ReplicaCalls` of replicas in this process. A killed replica breaks off all that it runs."""

    def __init__(self, router: PrefixRouter) -> None:
        self.router = router
        self.replicas: dict[str, Replica] = {}
        self.killed: dict[str, asyncio.Event] = {}
        self.warmed: dict[str, int] = {}
        self.sent: list[str] = []
        self.on_first: Any = None  # called in the event loop when a replica has sent something of a reply

    def announce(self) -> None:
        names = [name for name in self.replicas if name not in self.killed]
        self.router.update(names, {name: self.replicas[name].report().as_stats() for name in names})

    def kill(self, name: str) -> None:
        """End a replica without warning; in the event loop of the runner."""
        self.killed[name] = asyncio.Event()
        self.announce()

    def _choose(self, request: str | None) -> str:
        names = [name for name in self.replicas if name not in self.killed]
        if not names:
            raise ReplicaLost("there is no replica")
        return self.router.rank(request, names)[0][0]

    async def run(self, request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        name = self._choose(request)
        self.router.sent(request, name)
        self.sent.append(name)
        replies = self.replicas[name].run(request, body, identity)
        try:
            async for bodies in replies:
                if name in self.killed:
                    raise ReplicaLost(f"{name} was killed")
                yield Received(name, bodies)
                if bodies and self.on_first is not None:
                    call, self.on_first = self.on_first, None
                    call(name)
        finally:
            await replies.aclose()  # type: ignore[attr-defined]

    async def cancel(self, replica: str, request: str) -> None:
        self.replicas[replica].cancel(request)

    async def call(self, body: bytes, replica: str | None = None) -> bytes:
        return await self.replicas[replica or self._choose(None)].call(body)

    async def describe(self) -> tuple[str, bytes]:
        return self.replicas[self._choose(None)].describe()

    async def warm(self, replica: str, prefixes: Sequence[WirePrefix]) -> int:
        n = await asyncio.to_thread(self.replicas[replica].warm, prefixes, 30.0)
        self.warmed[replica] = n
        return n


def wait_until(condition: Callable[[], bool]) -> bool:
    """Return whether something happens within a minute."""
    pause = threading.Event()
    return any(condition() or pause.wait(0.02) for _ in range(3000))


class Fleet:
    """Three replicas of the demo model with caches of their own, and an ingress."""

    def __init__(self, directory: Path, n: int = 3, **options: object) -> None:
        self.directory = directory
        self.router = PrefixRouter(index=PrefixIndex(), random=Random(3))
        self.calls = LocalCalls(self.router)
        for name in "abcdef"[:n]:
            self.add(name)
        self.config = FleetConfig(model=erllama.demo_model(), name="demo", options=OPTIONS, **options)  # type: ignore[arg-type]
        self.model = open_ingress(self.config, self.calls, self.router)
        self.runner = self.model._runner
        assert isinstance(self.runner, FleetRunner)

    def add(self, name: str, **options: object) -> None:
        """Start a replica."""
        cache = erllama.Cache(ram="64MiB", disk=str(self.directory / str(options.pop("disk", name))), block_size=16)
        model = erllama.load_model(
            str(options.pop("model", erllama.demo_model())),
            id=f"{self.directory.name}-{name}",
            cache=cache,
            warmup=False,
            **{**OPTIONS, **options},
        )
        self.calls.replicas[name] = Replica(model, name)
        self.calls.announce()

    def in_loop(self, call: Callable[..., object], *args: object) -> None:
        """Run a function in the runner's event loop, and wait for it."""
        done = threading.Event()

        def run() -> None:
            call(*args)
            done.set()

        self.runner._loop.call_soon_threadsafe(run)
        assert done.wait(60)

    def close(self) -> None:
        self.model.unload()
        for replica in self.calls.replicas.values():
            replica.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    made.close()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[erllama.Model]:
    """One model in this process: what a fleet's replies are compared with."""
    with erllama.Cache(ram="64MiB") as cache:
        with erllama.load_model(erllama.demo_model(), cache=cache, warmup=False, **OPTIONS) as model:
            yield model


SAMPLED = {"max_tokens": 60, "temperature": 0.9, "seed": 11, "ignore_eos": True}
PROMPT = "Once upon a time, a small boat"


def sampled() -> dict[str, Any]:
    return {"max_tokens": 60, "temperature": 0.9, "seed": 11}


def test_a_fleet_replies_as_one_model_does(fleet: Fleet, alone: erllama.Model):
    assert fleet.model.complete(PROMPT, **sampled()).text == alone.complete(PROMPT, **sampled()).text
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    mine, theirs = (model.chat(messages, max_tokens=40, temperature=0) for model in (fleet.model, alone))
    assert (mine.text, mine.thinking) == (theirs.text, theirs.thinking)


def test_streamed_text_is_the_text_of_the_reply(fleet: Fleet):
    with fleet.model.stream(PROMPT, **sampled()) as stream:
        text = "".join(event.text for event in stream if isinstance(event, erllama.TextDelta))
        assert text == stream.result().text


def test_a_structured_reply_follows_its_schema(fleet: Fleet):
    reply = fleet.model.complete(
        "A number: ", json_schema={"enum": ["seven", "eight"]}, max_tokens=40, temperature=0
    )
    assert reply.text in ('"seven"', '"eight"')


def test_a_conversation_finds_its_prefix_on_one_replica(fleet: Fleet):
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 2 + 3?"}]
    for turn in range(4):
        reply = fleet.model.chat(messages, max_tokens=20, temperature=0)
        if turn:
            assert reply.cache.tokens > 0
        messages += [reply.message, {"role": "user", "content": f"And {turn} + 4?"}]
    assert len(set(fleet.calls.sent)) == 1


def test_errors_have_their_types(fleet: Fleet):
    with pytest.raises(erllama.PromptTooLong):
        fleet.model.complete(list(range(3, 300)) * 10, max_tokens=4)
    with pytest.raises(erllama.DeadlineExceeded):
        fleet.model.complete(PROMPT, max_tokens=1000, timeout=0.0001)
    with pytest.raises(erllama.Unsupported, match="fleet"):
        fleet.model.evict()


def test_a_killed_replica_leaves_the_reply_unchanged(fleet: Fleet, alone: erllama.Model):
    fleet.calls.on_first = fleet.calls.kill
    with fleet.model.stream(PROMPT, **sampled()) as stream:
        text = "".join(event.text for event in stream if isinstance(event, erllama.TextDelta))
        reply = stream.result()
    assert text == reply.text == alone.complete(PROMPT, **sampled()).text
    assert reply.restarts == 1
    assert len(fleet.calls.sent) == 2
    assert fleet.calls.sent[0] != fleet.calls.sent[1]


def test_a_conversation_continues_after_its_replica_was_killed(fleet: Fleet):
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 2 + 3?"}]
    reply = fleet.model.chat(messages, max_tokens=20, temperature=0)
    fleet.in_loop(fleet.calls.kill, fleet.calls.sent[0])
    messages += [reply.message, {"role": "user", "content": "And 4 + 4?"}]
    assert fleet.model.chat(messages, max_tokens=20, temperature=0).text is not None
    assert fleet.calls.sent[1] != fleet.calls.sent[0]


def test_a_request_that_two_replicas_do_not_survive_ends_with_an_error(fleet: Fleet):
    original = fleet.calls.run

    async def fatal(request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        async for received in original(request, body, identity):
            yield received._replace(bodies=[])
            raise ReplicaLost("it crashed")

    fleet.calls.run = fatal  # type: ignore[method-assign]
    with pytest.raises(erllama.RequestCrashed, match="2 replicas"):
        fleet.model.complete(PROMPT, max_tokens=4)
    fleet.calls.run = original  # type: ignore[method-assign]
    assert fleet.model.complete(PROMPT, max_tokens=4).tokens


def test_a_stopping_replica_keeps_its_requests_until_they_move(tmp_path: Path, alone: erllama.Model):
    fleet = Fleet(tmp_path, drain=0)
    try:

        def leave(name: str) -> None:
            others = [each for each in fleet.calls.replicas if each != name]
            fleet.router.update(others, {})

        fleet.calls.on_first = leave
        reply = fleet.model.complete(PROMPT, **{**sampled(), "max_tokens": 400})
        assert reply.restarts == 1
        assert reply.text == alone.complete(PROMPT, **{**sampled(), "max_tokens": 400}).text
    finally:
        fleet.close()


def test_a_drained_replica_ends_its_requests_itself(fleet: Fleet):
    def leave(name: str) -> None:
        fleet.router.update([each for each in fleet.calls.replicas if each != name], {})

    fleet.calls.on_first = leave
    assert fleet.model.complete(PROMPT, **sampled()).restarts == 0  # it has 30 seconds


def test_a_closed_replica_has_saved_what_it_computed(fleet: Fleet):
    tokens = fleet.model.tokenize(PROMPT * 8)
    fleet.model.prefill(tokens)
    name = fleet.calls.sent[-1]
    fleet.calls.replicas.pop(name).close()
    fleet.calls.announce()
    fleet.add("next", disk=name)
    namespace = fleet.runner.namespace(None)
    assert fleet.calls.replicas["next"]._runner.cached_prefix(namespace, tokens) >= len(tokens) - 16


def test_a_request_to_a_closed_replica_goes_to_another_one(fleet: Fleet):
    fleet.model.complete(PROMPT, max_tokens=2)
    fleet.calls.replicas[fleet.calls.sent[0]].close()
    assert len(fleet.model.complete(PROMPT, max_tokens=2).tokens) == 2


def test_a_cancelled_reply_ends_early(fleet: Fleet):
    with fleet.model.stream(PROMPT, max_tokens=1500, temperature=0.9, seed=5) as stream:
        next(iter(stream))
        stream.cancel()
        reply = stream.result()
    assert reply.finish_reason == "cancelled"
    assert len(reply.tokens) < 1500


def test_a_cancellation_before_the_options_are_checked_has_an_effect(fleet: Fleet):
    original, sent = fleet.calls.run, []

    async def cancelled_at_once(request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        async for received in original(request, body, identity):
            if not sent:
                sent.append(request)
                assert fleet.calls.replicas[received.replica]._requests[request] is None
                await fleet.calls.cancel(received.replica, request)
            yield received

    fleet.calls.run = cancelled_at_once  # type: ignore[method-assign]
    reply = fleet.model.complete(PROMPT, max_tokens=1500, temperature=0.9, seed=5)
    assert reply.finish_reason == "cancelled"
    assert sent
    for replica in fleet.calls.replicas.values():
        assert not replica._requests
        assert not replica._cancelled


def test_a_cancellation_of_no_request_leaves_nothing_behind(fleet: Fleet):
    replica = fleet.calls.replicas["a"]
    replica.cancel("nobody")
    assert not replica._cancelled


def hang(fleet: Fleet) -> threading.Event:
    """Let requests wait for a replica, as Ray does while there is none. Return what is set once one waits."""
    waits = threading.Event()

    async def run(request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        waits.set()
        await asyncio.Event().wait()
        yield Received("a", [])

    fleet.calls.run = run  # type: ignore[method-assign]
    return waits


@pytest.mark.parametrize("options", [{}, {"stop": ["x"]}, {"logprobs": 1}], ids=["text", "stops", "logprobs"])
def test_a_request_that_waits_for_a_replica_can_be_cancelled(fleet: Fleet, options: dict[str, Any]):
    original, waits = fleet.calls.run, hang(fleet)
    with fleet.model.stream(PROMPT, max_tokens=1500, timeout=600, **options) as stream:
        assert waits.wait(60)
        stream.cancel()
        assert wait_until(lambda: not fleet.runner._running)
        reply = stream.result()
    assert (reply.finish_reason, reply.text, reply.tokens, reply.restarts) == ("cancelled", "", (), 0)
    assert reply.context_tokens == tuple(fleet.model.tokenize(PROMPT))
    assert fleet.runner.metrics.finished == {"cancelled": 1}
    fleet.calls.run = original  # type: ignore[method-assign]
    assert fleet.model.complete(PROMPT, max_tokens=2).tokens


@pytest.mark.parametrize("options", [{}, {"stop": ["\0never"]}], ids=["text", "stops"])
def test_a_reply_cancelled_between_two_replicas_is_what_the_client_has(fleet: Fleet, options: dict[str, Any]):
    original, waits = fleet.calls.run, []

    def kill(name: str) -> None:
        waits.append(hang(fleet))
        fleet.calls.kill(name)

    fleet.calls.on_first = kill
    with fleet.model.stream(PROMPT, max_tokens=1500, temperature=0.9, seed=5, **options) as stream:
        events = iter(stream)
        text = next(events).text  # type: ignore[union-attr]
        assert wait_until(lambda: bool(waits))
        assert waits[0].wait(60)
        stream.cancel()
        assert wait_until(lambda: not fleet.runner._running)
        text += "".join(event.text for event in events if isinstance(event, erllama.TextDelta))
        reply = stream.result()
    assert reply.finish_reason == "cancelled"
    assert reply.restarts == 1
    assert reply.tokens
    assert text == reply.text
    fleet.calls.run = original  # type: ignore[method-assign]
    whole = fleet.model.complete(PROMPT, max_tokens=1500, temperature=0.9, seed=5, **options)
    assert whole.tokens[: len(reply.tokens)] == reply.tokens


def test_a_request_that_reaches_no_replica_is_not_blamed(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "_RETRY_SECONDS", 0.001)
    original, tries = fleet.calls.run, []

    async def unreachable(request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        tries.append(request)
        if len(tries) < n_failures:
            raise ReplicaLost("nobody is there")
        async for received in original(request, body, identity):
            yield received

    fleet.calls.run = unreachable  # type: ignore[method-assign]
    n_failures = 6
    reply = fleet.model.complete(PROMPT, max_tokens=2)
    assert (len(reply.tokens), reply.restarts, len(tries)) == (2, 0, 6)
    tries.clear()
    n_failures = 1000
    with pytest.raises(erllama.ModelFailed, match="reached no replica"):
        fleet.model.complete(PROMPT, max_tokens=2)
    assert len(tries) == runner_module._MAX_TRIES


def test_a_request_that_reaches_no_replica_ends_at_its_deadline(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "_RETRY_SECONDS", 1e6)
    monkeypatch.setattr(runner_module, "_MAX_RETRY_SECONDS", 1e6)
    for name in list(fleet.calls.replicas):
        fleet.in_loop(fleet.calls.kill, name)
    with pytest.raises(erllama.DeadlineExceeded):
        fleet.model.complete(PROMPT, max_tokens=2, timeout=0.2)


def test_sessions_of_replicas_that_left_are_forgotten(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "_MAX_SESSIONS", 3)
    for number in range(5):
        fleet.model.complete(PROMPT, max_tokens=1, session_id=str(number))
    known = fleet.runner._session_replicas
    assert [session for _, session in known] == ["2", "3", "4"]
    for name in list(fleet.calls.replicas):
        fleet.in_loop(fleet.calls.kill, name)
    fleet.in_loop(lambda: None)  # what `kill` announced was called before
    assert not known


def test_sessions_run_one_request_at_a_time(fleet: Fleet):
    with fleet.model.stream(PROMPT, max_tokens=1500, session_id="s", temperature=0.9) as stream:
        next(iter(stream))
        with pytest.raises(erllama.SessionBusy):
            fleet.model.complete(PROMPT, session_id="s")
        with pytest.raises(erllama.SessionBusy):
            fleet.model.end_session("s")
        stream.cancel()
        stream.result()
    assert fleet.model.end_session("s")
    assert not fleet.model.end_session("s")


def test_a_full_queue_refuses_requests(tmp_path: Path):
    fleet = Fleet(tmp_path, n=1, max_pending=1)
    try:
        with fleet.model.stream(PROMPT, max_tokens=1500) as stream:
            next(iter(stream))
            with pytest.raises(erllama.QueueFull, match="max_pending=1"):
                fleet.model.complete(PROMPT)
    finally:
        fleet.close()


def test_unloading_the_ingress_fails_its_requests(fleet: Fleet):
    stream = fleet.model.stream(PROMPT, max_tokens=1500)
    next(iter(stream))
    fleet.model.unload()
    with pytest.raises(erllama.ModelUnloaded):
        stream.result()


# --- replicas with another model ---------------------------------------------------------------------


def other_model(tmp_path: Path) -> Path:
    """Return a copy of the demo model with other weights."""
    raw = bytearray(erllama.demo_model().read_bytes())
    raw[-1000] ^= 1
    raw[len(raw) // 2] ^= 1
    changed = tmp_path / "other.gguf"
    changed.write_bytes(raw)
    return changed


def test_a_replica_with_another_model_gets_no_requests(fleet: Fleet, tmp_path: Path):
    fleet.add("other", n_ubatch=256, kv_type_k="f32", flash_attn=True)
    for number in range(12):
        fleet.model.complete(f"{number} boats", max_tokens=1)
    assert "other" not in fleet.calls.sent
    assert fleet.router.counts().refused_replicas == 1


def test_a_replica_with_another_model_refuses_requests(fleet: Fleet):
    for name in list(fleet.calls.replicas):
        fleet.calls.replicas.pop(name).close()
    fleet.add("other", kv_type_k="f32", flash_attn=True)
    with pytest.raises(erllama.ModelMismatch, match="runs another model"):
        fleet.model.complete(PROMPT, max_tokens=1)


def test_an_ingress_with_another_file_does_not_start(tmp_path: Path, fleet: Fleet):
    config = FleetConfig(
        model=other_model(tmp_path),
        name="demo2",
        options={**OPTIONS, "fingerprint": "fast_unsafe", "own_fingerprint": "x"},
    )
    with pytest.raises(erllama.ModelMismatch, match="have another file"):
        open_ingress(config, fleet.calls, fleet.router)


# --- new replicas --------------------------------------------------------------------------------------


def test_the_hottest_prefixes_are_sought_for_new_replicas_only(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    fleet.in_loop(lambda: None)  # the first replicas are known
    calls: list[int] = []
    monkeypatch.setattr(fleet.router, "hottest", lambda n: calls.append(n) or [])
    fleet.in_loop(fleet.calls.announce)
    fleet.in_loop(lambda: None)
    assert calls == []
    fleet.add("new")
    fleet.in_loop(lambda: None)
    assert calls == [16]


def test_a_new_replica_loads_the_hottest_prefixes_that_its_cache_has(fleet: Fleet):
    shared = "You are kind. " * 20
    for number in range(4):
        fleet.model.complete(shared + f"Number {number}", max_tokens=2)
    source = fleet.calls.sent[-1]
    fleet.calls.replicas[source]._model.cache.flush()
    fleet.add("new", disk=source)  # as a bucket that all replicas share
    deadline = threading.Event()
    for _ in range(600):
        if "new" in fleet.calls.warmed:
            break
        deadline.wait(0.1)
    n_shared = len(fleet.model.tokenize(shared))
    assert fleet.calls.warmed["new"] >= n_shared // 16 * 16 - 16


# --- errors of the transport ----------------------------------------------------------------------------


def test_an_error_without_a_text_is_named_by_its_type():
    assert [str(ReplicaLost.of(RuntimeError("first\nlast"), line)) for line in (0, -1)] == [
        "RuntimeError: first",
        "RuntimeError: last",
    ]
    assert [str(ReplicaLost.of(RuntimeError(), line)) for line in (0, -1)] == ["RuntimeError", "RuntimeError"]
