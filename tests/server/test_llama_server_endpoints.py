"""llama-server's endpoints beside completions: health, settings, metrics, tokens, adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.testclient import TestClient

import erllama
from erllama.server import ApiKey, ServedModel
from erllama.server.application import make_app, make_server
from erllama.server.settings.options import ServerOptions
from support.llama_server import client_of, post, refused


@pytest.fixture
def client(tiny: erllama.Model) -> Iterator[TestClient]:
    with client_of(tiny) as client:
        yield client


# --- health


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/readyz", "/livez"])
def test_health_needs_no_key(tiny: erllama.Model, path: str) -> None:
    with client_of(tiny, keys=(ApiKey(secret="secret"),)) as client:
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert client.get("/props").status_code == 401


def test_server_that_stops_lives_and_is_not_ready(tiny: erllama.Model) -> None:
    server = make_server(tiny, ServerOptions())
    client = TestClient(make_app(server), base_url="http://localhost")
    server.is_stopping = True
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable_error")
    assert client.get("/livez").status_code == 200


# --- settings


def test_props_describe_the_model(tiny: erllama.Model) -> None:
    with client_of(ServedModel(tiny, file="tiny.gguf", defaults={"top_k": 5})) as client:
        props = client.get("/props").json()
    assert props["model_alias"] == tiny.id
    assert props["model_path"] == "tiny.gguf"
    assert props["total_slots"] == tiny.info.n_seq_max
    assert props["default_generation_settings"]["n_ctx"] == tiny.n_ctx
    assert props["default_generation_settings"]["params"]["top_k"] == 5
    assert props["default_generation_settings"]["params"]["seed"] == -1
    assert (props["bos_token"], props["eos_token"]) == ("<s>", "</s>")


def test_settings_do_not_change_by_a_request(client: TestClient) -> None:
    assert refused(client, "/props", temperature=1)["code"] == 501


def test_slots_are_as_many_as_requests_can_run(tiny: erllama.Model, client: TestClient) -> None:
    slots = client.get("/slots").json()
    assert [each["id"] for each in slots] == list(range(tiny.info.n_seq_max))
    assert not any(each["is_processing"] for each in slots)
    assert client.get("/slots", params={"fail_on_no_slot": 1}).status_code == 200


def test_slots_have_no_files(client: TestClient) -> None:
    assert refused(client, "/slots/0?action=save", filename="/etc/passwd")["code"] == 501


def test_options_turn_slots_and_metrics_off(tiny: erllama.Model) -> None:
    with client_of(tiny, slots=False, metrics=False) as client:
        assert client.get("/slots").status_code == client.get("/metrics").status_code == 501
        props = client.get("/props").json()
        assert (props["endpoint_slots"], props["endpoint_metrics"]) == (False, False)


# --- metrics


def read_metrics(client: TestClient) -> dict[str, tuple[str, float]]:
    """Return llama-server's metrics: kind and value of each."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert int(answer.headers["process-start-time-unix"]) > 0
    families = [family for family in parse_text(answer.text) if family.name.startswith("llamacpp:")]
    return {sample.name: (family.type, sample.value) for family in families for sample in family.samples}


def test_metrics_count_tokens_as_the_answers_do(client: TestClient) -> None:
    prompt = "the quick brown fox jumps over the lazy dog"
    answers = [
        post(client, "/completion", prompt=prompt, n_predict=n, ignore_eos=True)["timings"] for n in (4, 1, 9)
    ]
    found = read_metrics(client)
    assert found["llamacpp:prompt_tokens_total"] == ("counter", sum(each["prompt_n"] for each in answers))
    assert found["llamacpp:prompt_tokens_cached_total"][1] == sum(each["cache_n"] for each in answers) > 0
    assert found["llamacpp:tokens_predicted_total"] == ("counter", 14)
    assert found["llamacpp:n_decode_total"][1] > 0
    assert f"llamacpp:n_tokens_max {len(prompt) + 1 + 9}" in client.get("/metrics").text.splitlines()
    assert found["llamacpp:requests_processing"] == ("gauge", 0)


def test_metrics_are_open_metrics_for_clients_that_ask(tiny: erllama.Model, client: TestClient) -> None:
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_open_metrics(answer.text)}
    assert families["llamacpp:tokens_predicted"].type == "counter"
    assert families["llamacpp:n_tokens_max"].type == "gauge"
    models = {sample.labels["model"] for sample in families["erllama_queue_depth"].samples}
    assert tiny.id in models


# --- tokens


def test_tokens_become_the_text_again(tiny: erllama.Model, client: TestClient) -> None:
    tokens = post(client, "/tokenize", content="What is it?")["tokens"]
    assert tokens == tiny.tokenize("What is it?", add_special=False).tolist()
    assert post(client, "/detokenize", tokens=tokens) == {"content": "What is it?"}


def test_special_tokens_are_added_and_parsed_on_request(tiny: erllama.Model, client: TestClient) -> None:
    bos, eos = (tiny.info.special_tokens[name].id for name in ("bos", "eos"))
    assert post(client, "/tokenize", content="a", add_special=True)["tokens"][0] == bos
    assert post(client, "/tokenize", content="</s>")["tokens"] == [eos]
    assert len(post(client, "/tokenize", content="</s>", parse_special=False)["tokens"]) == 4
    assert post(client, "/tokenize", content=[bos, "</s>"])["tokens"] == [bos, eos]
    assert post(client, "/tokenize") == {"tokens": []}


def test_pieces_are_texts_or_bytes(client: TestClient) -> None:
    pieces = [each["piece"] for each in post(client, "/tokenize", content="ä b", with_pieces=True)["tokens"]]
    assert pieces == [[0xC3], [0xA4], " ", "b"]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"content": 3.5}), ("/detokenize", {"tokens": [-1]})])
def test_wrong_tokens_are_refused(client: TestClient, path: str, body: dict[str, object]) -> None:
    assert refused(client, path, **body)["code"] == 400


def test_template_is_applied_as_in_a_chat(tiny: erllama.Model, client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = post(client, "/apply-template", messages=messages)["prompt"]
    assert prompt == tiny.render_chat(messages)
    without = post(client, "/apply-template", messages=messages, add_generation_prompt=False)["prompt"]
    assert prompt.startswith(without)
    assert prompt != without
    count = post(client, "/v1/chat/completions/input_tokens", messages=messages)["input_tokens"]
    assert count == len(tiny.apply_chat_template(messages))


def test_template_of_the_server_replaces_that_of_the_model(tiny: erllama.Model) -> None:
    template = "{{ messages[0].content }}|{{ tone }}|{{ tools | length if tools else 0 }}"
    with client_of(ServedModel(tiny, defaults={"chat_template": template})) as client:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
        answer = post(client, "/apply-template", **body, chat_template_kwargs={"tone": "dry"})
        assert answer["prompt"] == "Hi|dry|1"
        assert client.get("/props").json()["chat_template"] == template


# --- adapters


def test_scales_of_adapters_are_set_by_their_place(tiny: erllama.Model, loras: list[Path]) -> None:
    first, second = (tiny.load_adapter(path) for path in loras[:2])
    with client_of(tiny) as client:
        listed = client.get("/lora-adapters").json()
        assert [(each["id"], each["path"], each["scale"]) for each in listed] == [
            (0, loras[0].name, 1.0),
            (1, loras[1].name, 1.0),
        ]
        answer = client.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}])
        assert answer.json() == {"success": True}
        assert (first.scale, second.scale) == (0.0, 0.5)


def test_unknown_adapter_changes_no_scale(tiny: erllama.Model, loras: list[Path]) -> None:
    adapter = tiny.load_adapter(loras[0])
    with client_of(tiny) as client:
        answer = client.post("/lora-adapters", json=[{"id": 0, "scale": 0.5}, {"id": 7, "scale": 1.0}])
        assert answer.status_code == 400
        assert client.post("/lora-adapters", json={"path": "/etc/passwd"}).status_code == 400
    assert adapter.scale == 1.0


# --- errors


def test_openai_paths_without_prefix_have_llama_errors(client: TestClient) -> None:
    messages = [{"role": "user", "content": "x" * 3000}]
    error = refused(client, "/chat/completions", messages=messages)
    assert (error["type"], error["n_ctx"]) == ("exceed_context_size_error", 1024)
