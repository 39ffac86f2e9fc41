"""Pins of a server: `[[pins]]` of its configuration, and `cache_control` with a ttl of Anthropic's API."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.engine.backends.stub import StubBackend
from erllama.errors import OptionError, PinQuotaExceeded
from erllama.server import ApiKey, ServedModel
from erllama.server.conduct.rate_limits import RateLimits
from erllama.server.models import ModelPool
from erllama.server.pins import ClientPins, ConfiguredPins, PinEntry, PinOrder, pin_entries
from erllama.server.settings.configuration import read_configuration
from erllama.server.settings.settings import CommandOptions, read_settings
from support.anthropic_clients import THINKING_TEMPLATE, TOOLS, client_of
from support.chat.scripted_model import model_replying, user
from support.cli import write_replying_model
from support.engine_models import load_stub, random_prompt
from support.http_server import CHAT, RunningServer, chat_body, running_server, serve_command
from support.threads import wait_until

RULES = "".join(f"Rule {n}: {n * 7919 % 1000}.\n" for n in range(30))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[erllama.Cache]:
    with erllama.Cache(ram="8MiB", disk=tmp_path / "kv", block_size=16) as found:
        yield found


@pytest.fixture
def model(cache: erllama.Cache) -> Iterator[erllama.Model]:
    with model_replying("Fine.", template=THINKING_TEMPLATE, cache=cache) as found:
        yield found


@pytest.fixture
def server(model: erllama.Model) -> Iterator[RunningServer]:
    with running_server(model) as found:
        yield found


def pins_of(server: RunningServer, cache: erllama.Cache) -> list[erllama.Pin]:
    """Return the pins once all that clients asked for are made."""
    loop = server.uvicorn.servers[0].get_loop()
    asyncio.run_coroutine_threadsafe(server.state.client_pins.wait(), loop).result(60)
    return cache.pins()


def block(text: str, ttl: object = None) -> dict[str, object]:
    control = {"type": "ephemeral", **({} if ttl is None else {"ttl": ttl})}
    return {"type": "text", "text": text, "cache_control": control}


def ask(server: RunningServer, secret: str = "", **body: object) -> httpx.Response:
    usual: dict[str, object] = {"model": "any", "max_tokens": 10, "messages": [user("How are you?")]}
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    return server.post({**usual, **body}, "/v1/messages", headers=headers)


# --- the configuration --------------------------------------------------------------------------------


def test_configured_pins_are_read_with_their_files(tmp_path: Path) -> None:
    (tmp_path / "messages.json").write_text(json.dumps([user("hello")]))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "text.txt").write_text("Once")
    path = tmp_path / "erllama.toml"
    path.write_text(
        '[[pins]]\nmodel = "chat"\nsystem = "Be terse."\ntools_file = "tools.json"\nttl = "12h"\n'
        '[[pins]]\nmodel = "chat"\nname = "a"\nmessages_file = "messages.json"\ncache_salt = "x"\n'
        '[[pins]]\nmodel = "chat"\ntext_file = "text.txt"\nttl = 60\n'
    )
    assert read_configuration(path).pins == (
        PinEntry(model="chat", content=[{"role": "system", "content": "Be terse."}], tools=TOOLS, ttl=43200),
        PinEntry(model="chat", content=[user("hello")], name="a", cache_salt="x"),
        PinEntry(model="chat", content="Once", ttl=60),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('system = "a"', "line 1: a pin needs a model"),
        ('model = "m"', "line 1: a pin needs one of system, text_file, messages_file"),
        ('model = "m"\nsystem = "a"\ntext_file = "t"', "a pin needs one of"),
        ('model = "m"\nsystem = 7', "line 3: system must be a text"),
        ('model = "m"\nsystem = "a"\nttl = "soon"', "line 4: ttl='soon'; pass seconds"),
        ('model = "m"\nsystem = "a"\nttl = 0', "line 4: ttl=0; pass more than 0 seconds"),
        ('model = "m"\nsystem = "a"\nname = "two\\nlines"', "line 4: name='two.*printable characters"),
        (f'model = "m"\nname = "{"x" * 201}"\nsystem = "a"', "line 3: name='x.*printable characters"),
        ('model = "m"\nsystem = "a"\nsistem = "a"', "line 4: .* did you mean 'system'"),
        ('model = "m"\ntext_file = "none.txt"', "line 3: text_file: .*none.txt cannot be read"),
        ('model = "m"\nmessages_file = "erllama.toml"', "line 3: messages_file: .* is not JSON"),
        ('model = "m"\ntext_file = "erllama.toml"\ntools_file = "x"', "line 4: tools_file has an effect"),
    ],
)
def test_mistakes_in_pins_are_reported_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "erllama.toml"
    path.write_text(f"[[pins]]\n{text}\n")
    (mistake,) = read_configuration(path).mistakes
    assert re.search(message, str(mistake))


def test_a_pin_of_an_unknown_model_is_a_mistake_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "erllama.toml"
    path.write_text('[[pins]]\nsystem = "a"\nmodel = "other"\n')
    with pytest.raises(OptionError, match="line 3: a pin names the model 'other'; the server has demo"):
        read_settings(CommandOptions(config=path))


def test_two_pins_of_one_name_are_a_mistake_with_its_line(tmp_path: Path) -> None:
    """Names are unique in the cache, which all models share."""
    path = tmp_path / "erllama.toml"
    pin = '[[pins]]\nmodel = "demo"\nsystem = "{}"\n'
    path.write_text(pin.format("a") + 'name = "x"\n' + pin.format("b") + pin.format("c") + 'name = "x"\n')
    with pytest.raises(OptionError, match="line 9: two pins have the name 'x'"):
        read_settings(CommandOptions(config=path))


def test_requests_of_a_key_find_the_pin_of_its_salt_warm(model: erllama.Model, cache: erllama.Cache) -> None:
    system = {"role": "system", "content": RULES}
    entry = PinEntry(model="chat", content=[system], name="rules", cache_salt="team")
    pin_entries(ServedModel(model), [entry], has_keys=True)
    (pin,) = cache.pins()
    keys = (ApiKey(secret="a", cache_salt="team"), ApiKey(secret="b"))
    with running_server(model, keys=keys) as server:
        body = {"messages": [system, user("hello")], "max_tokens": 5}
        for secret, expected in (("b", 0), ("a", pin.n_tokens)):
            answer = server.post(body, headers={"authorization": f"Bearer {secret}"}).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == expected


def test_a_pin_that_fails_is_logged_and_the_others_are_made(
    model: erllama.Model, cache: erllama.Cache, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [
        PinEntry(model=model.id, content=[{"role": "nobody", "content": 7}], name="bad"),
        PinEntry(model="other", content="Once", name="of another model"),
        PinEntry(model=model.id, content="Once upon a time", name="good"),
    ]
    with caplog.at_level(logging.WARNING, "erllama.server"):
        ConfiguredPins().set(entries, ModelPool([ServedModel(model)]), has_keys=False)
        wait_until(lambda: [pin.name for pin in cache.pins()] == ["good"])
    assert "could not be pinned" in caplog.text


def test_the_command_pins_what_its_configuration_names(tmp_path: Path) -> None:
    path = write_replying_model(tmp_path / "little.gguf", "Hi you")
    config = tmp_path / "erllama.toml"
    config.write_text(f'[[pins]]\nmodel = "little"\nname = "rules"\nsystem = "{"Be terse. " * 30}"\n')
    directory = tmp_path / "kv"
    options = ("--threads", 1, "--n-ctx", 1024, "--config", config)
    with serve_command(tmp_path, path, *options) as server:
        with erllama.Cache(ram=0, disk=directory, watch=False) as cache:
            wait_until(lambda: [pin.name for pin in cache.pins()] == ["rules"])
            (pin,) = cache.pins()
        body = chat_body() | {"messages": [{"role": "system", "content": "Be terse. " * 30}, user("hello")]}
        answer = httpx.post(server.url + CHAT, json=body, timeout=120).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= pin.n_tokens
        server.stop()


def test_pins_are_made_when_their_model_is_loaded_and_by_a_reload(tmp_path: Path) -> None:
    path = write_replying_model(tmp_path / "little.gguf", "Hi you")
    config = tmp_path / "erllama.toml"
    pin = '[[pins]]\nmodel = "small"\nname = "{}"\nsystem = "Be {}."\n'
    config.write_text(pin.format("rules", "terse"))
    options = ("--threads", 1, "--n-ctx", 1024, "--config", config, "--on-request", "--in-process")
    with serve_command(tmp_path, f"small={path}", *options) as server:
        with erllama.Cache(ram=0, disk=tmp_path / "kv", watch=False) as cache:
            assert cache.pins() == []
            assert httpx.post(server.url + CHAT, json=chat_body(max_tokens=1), timeout=120).status_code == 200
            wait_until(lambda: [pin.name for pin in cache.pins()] == ["rules"])
            config.write_text(pin.format("rules", "terse") + pin.format("more", "kind"))
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: {pin.name for pin in cache.pins()} == {"rules", "more"})
        server.stop()


# --- cache_control --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_ttl_pins_the_prefix_up_to_its_block(server: RunningServer, cache: erllama.Cache, stream: bool) -> None:
    answer = ask(server, system=[block(RULES, "1h"), {"type": "text", "text": "Monday it is."}], stream=stream)
    assert answer.status_code == 200
    (pin,) = pins_of(server, cache)
    assert pin.name.startswith("client-1h-")
    assert pin.expires is not None
    assert pin.expires - pin.created == pytest.approx(3600, abs=60)
    model = server.state.models.loaded()[0].model
    other = [{"role": "system", "content": RULES + "Friday it is."}, user("hello")]
    cache.evict_bytes(10**9, ("ram", "disk"))
    assert pin.n_tokens > len(RULES) / 8
    assert model.cached_prefix(model.apply_chat_template(other)) == pin.n_tokens


def test_the_longest_prefix_of_each_time_is_pinned(server: RunningServer, cache: erllama.Cache) -> None:
    tools = [{**TOOLS[0], "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    messages = [{"role": "user", "content": [block("How", "5m"), block(" are you?", "5m")]}]
    ask(server, tools=tools, system=[block(RULES, "1h")], messages=messages)
    found = pins_of(server, cache)
    assert sorted(pin.name[:10] for pin in found) == ["client-1h-", "client-5m-"]
    long, short = sorted(found, key=lambda pin: pin.n_tokens, reverse=True)
    assert (long.name[:9], short.name[:9]) == ("client-5m", "client-1h")


def test_the_same_prefix_has_one_pin(server: RunningServer, cache: erllama.Cache) -> None:
    for question in ("How are you?", "Who are you?"):
        ask(server, system=[block(RULES, "5m")], messages=[user(question)])
        pins_of(server, cache)
    assert len(pins_of(server, cache)) == 1


@pytest.mark.parametrize("ttl", [None, "2h", 300, {"a": 1}, ""])
def test_without_a_known_ttl_no_prefix_is_pinned(server: RunningServer, cache: erllama.Cache, ttl: object) -> None:
    assert ask(server, system=[block(RULES, ttl)]).status_code == 200
    assert pins_of(server, cache) == []


def test_anthropics_client_can_ask_for_a_ttl(server: RunningServer, cache: erllama.Cache) -> None:
    with client_of(server.url) as client:
        system = [block(RULES, "5m")]
        client.messages.create(model="any", max_tokens=5, system=system, messages=[user("hello")])  # type: ignore[arg-type]
    assert len(pins_of(server, cache)) == 1


def test_clients_have_half_of_the_bound_and_no_request_fails(tmp_path: Path) -> None:
    with (
        erllama.Cache(ram="8MiB", disk=tmp_path, block_size=16, pin_quota=30_000) as cache,
        model_replying("Fine.", cache=cache) as model,
        running_server(model) as server,
    ):
        for n in range(6):
            assert ask(server, system=[block(f"Text {n}. " * 12, "1h")]).status_code == 200
            pins_of(server, cache)
        assert 0 < cache.counters()["bytes_pinned"] <= 15_000
        assert cache.counters()["pins_refused"] > 0
        assert model.pin("Of the operator. " * 4).complete


def test_a_conversation_has_one_pin(server: RunningServer, cache: erllama.Cache) -> None:
    messages: list[dict[str, object]] = []
    lengths = []
    for question in ("How are you?", "Who are you?", "Where are you?"):
        messages = [*messages, {"role": "user", "content": [block(question, "5m")]}]
        ask(server, system=[block(RULES, "1h")], messages=messages)
        messages.append({"role": "assistant", "content": "Fine."})
        system, turn = sorted(pins_of(server, cache), key=lambda pin: pin.n_tokens)
        assert (system.name[:10], turn.name[:10]) == ("client-1h-", "client-5m-")
        lengths.append(turn.n_tokens)
    assert lengths[0] < lengths[1] < lengths[2]


def test_each_key_has_pins_of_its_own_number(
    model: erllama.Model, cache: erllama.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erllama.server.pins._MAX_CLIENT_PINS", 2)
    names: list[str] = []
    with running_server(model, keys=(ApiKey(secret="a"), ApiKey(secret="b"))) as server:
        for secret, n in (("b", 0), ("a", 1), ("a", 2), ("a", 3)):
            ask(server, secret, system=[block(f"{n} {RULES}", "1h")])
            names += [pin.name for pin in pins_of(server, cache) if pin.name not in names]
    assert {pin.name for pin in cache.pins()} == {names[0], *names[2:]}


def test_the_key_is_charged_for_what_its_pin_computes(
    cache: erllama.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pin_computed(*args: object, count: Callable[[int], object], **options: object) -> None:
        count(50)
        raise PinQuotaExceeded("too much")

    monkeypatch.setattr("erllama._model.requests.pins.PinRequests.pin_computed", pin_computed)
    charged: list[tuple[str, int]] = []
    key = ApiKey(secret="a", tokens_per_minute=10_000)
    with model_replying("Fine.", cache=cache) as model, running_server(model, keys=(key,)) as server:
        monkeypatch.setattr(RateLimits, "charge", lambda self, key, n: charged.append((key.secret, n)))
        ask(server, "a", system=[block(RULES, "1h")])
        pins_of(server, cache)
    assert charged[-1] == ("a", 50)


def pin_for_client(pins: ClientPins, model: erllama.Model, prefix: NDArray[np.int32], ttl: str = "1h") -> int:
    """Pin a prefix for a client. Return the number of tokens that the client is charged for."""
    charges: list[int] = []

    async def find_prefix() -> NDArray[np.int32]:
        return prefix

    async def main() -> None:
        pins.begin(PinOrder(model=model, find_prefix=find_prefix, ttl=ttl, charge=charges.append))
        await pins.wait()

    asyncio.run(main())
    return sum(charges)


def test_expired_pins_do_not_count(cache: erllama.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.server.pins._MAX_CLIENT_PINS", 2)
    pins, prefixes = ClientPins(b"key"), [random_prompt(n, 60) for n in range(3)]
    with load_stub(StubBackend(n_ctx=1024), cache=cache) as model:
        for prefix in prefixes:
            model.prefill(prefix)
        pin_for_client(pins, model, prefixes[0], "1h")
        pin_for_client(pins, model, prefixes[1], "5m")
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 301)
        pin_for_client(pins, model, prefixes[2], "1h")
        assert len(cache.pins()) == 2


def test_a_pin_of_a_client_computes_no_token(cache: erllama.Cache) -> None:
    """The request has computed the prefix. If it is not stored any more, other blocks needed its room."""
    backend, prompt = StubBackend(n_ctx=1024), random_prompt(1, 200)
    with load_stub(backend, cache=cache) as model:
        model.prefill(prompt)
        for prefix in (prompt[:150], random_prompt(2, 200)):
            assert pin_for_client(ClientPins(b"key"), model, prefix) == 0
        assert [(pin.n_tokens, pin.complete) for pin in cache.pins()] == [(150, True)]
        assert backend.tokens_decoded == 200


def test_memory_that_cannot_be_cut_computes_the_end_of_a_prefix_once(cache: erllama.Cache) -> None:
    backend, prompt = StubBackend(n_ctx=1024, can_trim=False), random_prompt(1, 200)
    with load_stub(backend, cache=cache) as model:
        model.prefill(prompt)
        for expected in (150 - 144, 0):
            n_decoded = backend.tokens_decoded
            assert pin_for_client(ClientPins(b"key"), model, prompt[:150]) == expected
            assert backend.tokens_decoded - n_decoded == expected
            assert [(pin.n_tokens, pin.complete) for pin in cache.pins()] == [(150, True)]


def test_names_of_pins_depend_on_the_key_of_the_server(cache: erllama.Cache) -> None:
    """Without that key, a name confirms no guess of a prompt."""
    prefix = random_prompt(1, 60)
    with load_stub(StubBackend(n_ctx=1024), cache=cache) as model:
        model.prefill(prefix)
        for key in (b"a", b"a", b"b"):
            pin_for_client(ClientPins(key), model, prefix)
    assert len({pin.name for pin in cache.pins()}) == 2


def test_the_oldest_pin_of_clients_ends_beyond_their_number(
    server: RunningServer, cache: erllama.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erllama.server.pins._MAX_CLIENT_PINS", 2)
    for n in range(4):
        ask(server, system=[block(f"{n} {RULES}", "1h")])
        pins_of(server, cache)
    assert len(pins_of(server, cache)) == 2
