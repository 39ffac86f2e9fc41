"""The metrics of a server: vLLM's names where the meaning is the same, counted when a request ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest

import erllama
from erllama.cache import Cache
from erllama.server import ApiKey
from support.engine_models import GatedBackend
from support.http_server import RunningServer, chat_body, running
from support.threads import wait_until

PROMPT = "the same words in every request " * 10


@pytest.fixture
def backend() -> GatedBackend:
    return GatedBackend()


@pytest.fixture
def model(backend: GatedBackend) -> Iterator[erllama.Model]:
    with Cache(block_size=32) as cache, erllama.load_backend(backend, id="m", cache=cache, n_seq_max=2) as model:
        yield model
        backend.release()


def value(server: RunningServer, name: str, **labels: str) -> float | None:
    return server.state.metrics.registry.get_sample_value(name, labels)


def test_tokens_of_prompts_replies_and_the_cache_are_counted(model: erllama.Model) -> None:
    with running(model) as server:
        usages = [server.post(chat_body(PROMPT, max_tokens=5)).json()["usage"] for _ in range(2)]
        wait_until(
            lambda: value(server, "vllm:request_success_total", model_name="m", finished_reason="length") == 2
        )
        n_prompt = sum(usage["prompt_tokens"] for usage in usages)
        n_cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        assert n_cached > 200
        assert value(server, "vllm:prompt_tokens_total", model_name="m") == n_prompt
        assert value(server, "vllm:prefix_cache_queries_total", model_name="m") == n_prompt
        assert value(server, "vllm:prefix_cache_hits_total", model_name="m") == n_cached
        assert value(server, "vllm:generation_tokens_total", model_name="m") == 10


@pytest.mark.parametrize("stream", [True, False])
def test_each_reply_is_observed_once_by_each_histogram(model: erllama.Model, stream: bool) -> None:
    with running(model) as server:
        server.post(chat_body(max_tokens=5, stream=stream))
        wait_until(lambda: value(server, "vllm:e2e_request_latency_seconds_count", model_name="m"))
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
        ):
            assert value(server, f"vllm:{name}_count", model_name="m") == 1, name
        assert value(server, "vllm:request_generation_tokens_sum", model_name="m") == 5


def test_running_and_waiting_requests_are_read_at_the_scrape(model: erllama.Model, backend: GatedBackend) -> None:
    with running(model) as server:
        assert value(server, "vllm:num_requests_running", model_name="m") == 0
        clients = [server.send(chat_body(f"{i}", stream=True)) for i in range(2)]
        wait_until(lambda: model.queue_depth == 2)
        backend.hold()
        clients.append(server.send(chat_body("third")))
        wait_until(lambda: value(server, "vllm:num_requests_waiting", model_name="m") == 1)
        assert value(server, "vllm:num_requests_running", model_name="m") == 2
        for client in clients:
            client.close()
        backend.release()
        wait_until(lambda: model.queue_depth + model.pending == 0)


def test_abandoned_requests_count_as_aborted(model: erllama.Model, backend: GatedBackend) -> None:
    with running(model) as server:
        client = server.send(chat_body(stream=True))
        wait_until(lambda: len(backend.batches) > 5)
        client.close()
        wait_until(lambda: value(server, "vllm:request_success_total", model_name="m", finished_reason="abort"))


def test_answers_and_errors_are_counted_by_endpoint_and_key(model: erllama.Model) -> None:
    path = "/v1/chat/completions"
    with running(model, keys=(ApiKey(secret="s", name="laptop"),)) as server:
        server.post(chat_body(max_tokens=1), headers={"x-api-key": "s"})
        server.post(chat_body(top_p=7), headers={"x-api-key": "s"})
        server.post(chat_body())
        server.post(chat_body(), path="/nothing")
        counted = {("200", "laptop"): 1, ("400", "laptop"): 1, ("401", ""): 1}
        for (status, key), n in counted.items():
            wait_until(
                lambda status=status, key=key, n=n: (  # type: ignore[misc]
                    value(server, "erllama_http_requests_total", endpoint=path, status=status, key=key) == n
                )
            )
        wait_until(lambda: value(server, "erllama_http_requests_total", endpoint="", status="404", key=""))
        assert value(server, "erllama_request_errors_total", endpoint=path, error="invalid_api_key") == 1


def test_the_registry_has_the_metrics_of_models_and_caches_too(model: erllama.Model) -> None:
    with running(model) as server:
        text = generate_latest(server.state.metrics.registry).decode()
    assert 'erllama_queue_depth{model="m"}' in text
    assert "erllama_cache_bytes" in text
