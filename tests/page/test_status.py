"""`GET /erllama/status`: the tiers, what came from the cache over time, pins, and the models that a key may use."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import erllama
from erllama.cache import Cache, Pin
from erllama.server import ApiKey
from erllama.server.hit_history import MAX_INTERVALS, Counts, HitHistory
from support.engine_models import GatedBackend
from support.http_server import RunningServer, chat_body, running
from support.paths import ROOT
from support.threads import wait_until

LONG = "the same words in every request " * 20
PAGE = ROOT / "docs" / "server" / "page.md"


@pytest.fixture
def model(tmp_path: Path) -> Iterator[erllama.Model]:
    backend = GatedBackend()
    with (
        Cache(block_size=32, ram="1MiB", disk=tmp_path, disk_quota="8MiB") as cache,
        erllama.load_backend(backend, id="m", cache=cache, n_seq_max=2) as model,
    ):
        yield model
        backend.release()


def status(server: RunningServer, key: str = "") -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = httpx.get(f"{server.url}/erllama/status", headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_requests_are_counted_with_what_the_cache_had(model: erllama.Model) -> None:
    with running(model) as server:
        usages = [server.post(chat_body(LONG, max_tokens=4)).json()["usage"] for _ in range(2)]
        wait_until(lambda: status(server)["totals"]["requests"] == 2)
        found = status(server)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert cached > 500
    totals = {
        "requests": 2,
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
        "cached_tokens": cached,
        "completion_tokens": sum(usage["completion_tokens"] for usage in usages),
    }
    assert found["totals"] == totals
    intervals = found["history"]["intervals"]
    assert {name: sum(each[name] for each in intervals) for name in totals} == totals
    assert all(each["began"] % found["history"]["interval_seconds"] == 0 for each in intervals)
    assert abs(found["time"] - time.time()) < 60


def test_tiers_have_their_bytes_and_limits(model: erllama.Model) -> None:
    with running(model) as server:
        server.post(chat_body(LONG, max_tokens=4))
        model.cache.flush()
        tiers = {each["tier"]: each for each in status(server)["tiers"]}
    assert tiers["ram"]["limit"] == 1 << 20
    assert tiers["disk"]["limit"] == 8 << 20
    for tier in (tiers["ram"], tiers["disk"]):
        assert 0 < tier["bytes"] <= tier["limit"]
        assert tier["blocks"] > 0
        assert not tier["failed"]
        assert not tier["read_only"]


def test_the_memory_of_several_models_is_one_tier(model: erllama.Model) -> None:
    with erllama.load_backend(GatedBackend(), id="second", cache=model.cache) as second:
        with running([model, second]) as server:  # type: ignore[list-item]
            tiers = status(server)["tiers"]
    assert [tier["tier"] for tier in tiers] == ["live", "ram", "disk"]
    statuses = [each for each in model.cache.tiers() if each.tier == "live"]
    assert tiers[0]["places"] == 2 * len(statuses) == 2


def test_no_path_is_in_the_answer(model: erllama.Model, tmp_path: Path) -> None:
    with running(model) as server:
        server.post(chat_body(LONG, max_tokens=1))
        assert str(tmp_path) not in json.dumps(status(server))


def test_models_have_their_state_and_their_slots(model: erllama.Model) -> None:
    with running(model) as server:
        (found,) = status(server)["models"]
    assert found["name"] == "m"
    assert found["state"] == "loaded"
    assert found["slots"] == {"total": 2, "running": 0, "waiting": 0}
    assert found["uses_cache"]


def test_a_key_sees_its_models_alone(model: erllama.Model) -> None:
    with Cache() as cache, erllama.load_backend(GatedBackend(), id="second", cache=cache) as second:
        keys = (ApiKey(secret="one", models=("second",)), ApiKey(secret="all"))
        with running([model, second], keys=keys) as server:  # type: ignore[list-item]
            server.post(chat_body(LONG, model="m", max_tokens=1), headers={"x-api-key": "all"})
            wait_until(lambda: status(server, "all")["totals"]["requests"] == 1)
            own = status(server, "one")
            everything = status(server, "all")
    assert [each["name"] for each in own["models"]] == ["second"]
    assert own["totals"]["requests"] == 0
    assert own["history"]["intervals"] == []
    assert "disk" not in [tier["tier"] for tier in own["tiers"]], "the cache of another model"
    assert [each["name"] for each in everything["models"]] == ["m", "second"]
    assert len(everything["history"]["intervals"]) == 1


def test_pins_are_listed_if_the_cache_has_some(model: erllama.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Pin("system", "m", 2000, 4096, None, 1.0, 1900)
    monkeypatch.setattr(Cache, "pins", lambda self: [pin])
    with running(model) as server:
        assert status(server)["pins"] == [
            {
                "name": "system",
                "model": "m",
                "tokens": 2000,
                "stored_tokens": 1900,
                "bytes": 4096,
                "created": 1.0,
                "expires": None,
            }
        ]
    keys = (
        ApiKey(secret="one", models=("m",)),
        ApiKey(secret="all"),
        ApiKey(secret="none", models=()),
        ApiKey(secret="salted", cache_salt="s"),
    )
    with running(model, keys=keys) as server:
        found = [len(status(server, key.secret)["pins"]) for key in keys]
    assert found == [1, 1, 0, 0]


# --- the history -----------------------------------------------------------------------------------


def test_the_history_is_bounded_and_the_totals_are_not() -> None:
    now = 1000.0
    history = HitHistory(lambda: now)
    for _ in range(MAX_INTERVALS + 5):
        history.add("m", 10, 5, 1)
        history.add("m", 10, 5, 1)
        now += 60
    assert len(history.intervals) == MAX_INTERVALS
    assert history.intervals[0].began == 1000 + 5 * 60
    assert history.intervals[-1].counts == {"m": Counts(2, 20, 10, 2)}
    assert history.totals["m"].requests == 2 * (MAX_INTERVALS + 5)


def test_a_clock_that_is_set_back_keeps_the_history_in_order() -> None:
    now = 1000.0
    history = HitHistory(lambda: now)
    history.add("m", 10, 5, 1)
    now = 500.0
    history.add("m", 10, 5, 1)
    assert [each.began for each in history.intervals] == [1000]
    assert history.totals == {"m": Counts(2, 20, 10, 2)}


def test_the_documented_answer_has_the_fields_of_an_answer(
    model: erllama.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = Pin("system", "m", 2000, 4096, None, 1.0, 1900)
    monkeypatch.setattr(Cache, "pins", lambda self: [pin])
    (documented,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with running(model) as server:
        server.post(chat_body(LONG, max_tokens=1))
        wait_until(lambda: status(server)["totals"]["requests"] == 1)
        found = status(server)

    def fields(value: object) -> object:
        if isinstance(value, dict):
            return {name: fields(each) for name, each in value.items()}
        return [fields(value[0])] if isinstance(value, list) and value else None

    assert fields(json.loads(documented)) == fields(found)
