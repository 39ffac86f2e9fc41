"""Prometheus metrics of a server: its requests, under vLLM's names where the meaning is the same.

`ServerMetrics.registry` is what `GET /metrics` writes. It also has the metrics of models and caches, those of
`erllama.metrics`. Counts are added when a request ends; what runs and waits is read at the scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from erllama import metrics
from erllama.server.conduct.keys import ApiKey

# vLLM's words for how a request ended. An error has none of ours.
_FINISHED_REASONS: Mapping[str, str] = {
    "stop": "stop",
    "tool_calls": "stop",
    "length": "length",
    "context_full": "length",
    "cancelled": "abort",
}
# Seconds. Short ones for prompts that the cache has, long ones for long prompts on a CPU.
_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)

# Begins the note of a call whose prompt shares less with the previous one than it should.
PREFIX_CHANGED = "prefix changed"


class EndedCall(Protocol):
    """What the metrics read of a call that has ended. `erllama.server.endpoints.CallRecord` documents it."""

    endpoint: str
    model: str
    first_token: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    finish_reason: str
    error: str
    notes: list[str]


class ModelReading(NamedTuple):
    """The state of a model at a scrape.

    Attributes:
        model: its name.
        is_loaded: whether it is loaded.
        running, waiting: requests that compute, and that wait for it or in it.
        slots: requests that can run at once; 0 if it is not loaded.
        memory: bytes.
        loads, load_failures: how many there were.
        unloads: how many there were, by reason.
    """

    model: str
    is_loaded: bool
    running: int
    waiting: int
    slots: int
    memory: int
    loads: int
    load_failures: int
    unloads: Mapping[str, int]


class ServerMetrics:
    """The metrics of one server.

    Args:
        read_models: returns the state of each model, at a scrape.
        read_limit: returns the memory limit in bytes; 0 without one.

    Attributes:
        registry: with these metrics, and those of all models and caches of this process.
        longest: tokens of the longest prompt with its replies.
    """

    def __init__(
        self, read_models: Callable[[], Iterable[ModelReading]], read_limit: Callable[[], int] = lambda: 0
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._prompts: dict[str, tuple[int, int]] = {}
        self.longest = 0
        metrics.register(registry)
        registry.register(_ModelCollector(read_models, read_limit))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"vllm:{name}", text, ("model_name",), buckets=buckets, registry=registry)

        self._http = counter("erllama_http_requests", "Requests that ended.", "endpoint", "status", "key")
        self._errors = counter("erllama_request_errors", "Requests that ended with an error.", "endpoint", "error")
        self._reloads = counter("erllama_reloads", "Reloads of the configuration.", "result")
        self._prefixes = counter(
            "erllama_prefix_changes", "Requests whose prompt changed near the start of its prefix.", "model_name"
        )
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens.", "model_name")
        self._generated = counter("vllm:generation_tokens", "Tokens of replies.", "model_name")
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", "model_name")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens that the cache had.", "model_name")
        self._success = counter("vllm:request_success", "Replies that ended.", "model_name", "finished_reason")
        self._first_token = histogram("time_to_first_token_seconds", "Seconds until the first token.")
        self._between = histogram("inter_token_latency_seconds", "Mean seconds between the tokens of a reply.")
        self._latency = histogram("e2e_request_latency_seconds", "Seconds to the end of the answer.")
        self._queue = histogram("request_queue_time_seconds", "Seconds that a request waited for the model.")
        self._prefill = histogram("request_prefill_time_seconds", "Seconds of restoring and computing a prompt.")
        self._decode = histogram("request_decode_time_seconds", "Seconds from the first token to the last.")
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._reply_sizes = histogram("request_generation_tokens", "Tokens of a request's replies.", _TOKENS)

    def count_reload(self, *, succeeded: bool) -> None:
        """Count a reload of the configuration."""
        self._reloads.labels("ok" if succeeded else "error").inc()

    def count(self, call: EndedCall | None, key: ApiKey | None, status: int, seconds: float) -> None:
        """Count a request that ended.

        Args:
            call: None for a path without an endpoint.
            key: the client's; None if the server has no keys, or none was sent.
            status: of the answer; 499 if the client left before it.
            seconds: until the end of the answer.
        """
        endpoint = call.endpoint if call is not None else ""
        self._http.labels(endpoint, str(status), key.name if key is not None else "").inc()
        if call is None:
            return
        if call.error:
            self._errors.labels(endpoint, call.error).inc()
        if call.model and (call.prompt_tokens or call.finish_reason):
            self._count_replies(call, seconds)

    def prompt_tokens(self, model: str) -> tuple[int, int]:
        """Return how many prompt tokens a model has had, and how many of them the cache had."""
        return self._prompts.get(model, (0, 0))

    def _count_replies(self, call: EndedCall, seconds: float) -> None:
        model = call.model
        n_prompt, n_cached = self.prompt_tokens(model)
        self._prompts[model] = n_prompt + call.prompt_tokens, n_cached + call.cached_tokens
        self._prompt.labels(model).inc(call.prompt_tokens)
        self._generated.labels(model).inc(call.completion_tokens)
        self._queries.labels(model).inc(call.prompt_tokens)
        self._hits.labels(model).inc(call.cached_tokens)
        self._prompt_sizes.labels(model).observe(call.prompt_tokens)
        self._reply_sizes.labels(model).observe(call.completion_tokens)
        self._latency.labels(model).observe(seconds)
        self.longest = max(self.longest, call.prompt_tokens + call.completion_tokens)
        if any(note.startswith(PREFIX_CHANGED) for note in call.notes):
            self._prefixes.labels(model).inc()
        if call.first_token is not None:
            self._first_token.labels(model).observe(call.first_token)
        if call.finish_reason:
            reason = _FINISHED_REASONS.get(call.finish_reason, call.finish_reason)
            self._success.labels(model, reason).inc()
            self._queue.labels(model).observe(call.queue_seconds)
            self._prefill.labels(model).observe(call.prefill_seconds)
            self._decode.labels(model).observe(call.decode_seconds)
        if call.completion_tokens > 1:
            self._between.labels(model).observe(call.decode_seconds / (call.completion_tokens - 1))


class _ModelCollector(Collector):
    """Reads at a scrape which models are loaded, what they take, and how many requests run and wait."""

    def __init__(self, read_models: Callable[[], Iterable[ModelReading]], read_limit: Callable[[], int]) -> None:
        self._read_models, self._read_limit = read_models, read_limit

    def describe(self) -> Iterable[Metric]:
        return self._families([])

    def collect(self) -> Iterable[Metric]:
        families = self._families(list(self._read_models()))
        limit = self._read_limit()
        if limit:
            families.append(
                GaugeMetricFamily("erllama_memory_limit_bytes", "Memory for all models of the server.", limit)
            )
        return families

    @staticmethod
    def _families(models: Sequence[ModelReading]) -> list[Metric]:
        def gauge(name: str, text: str, value: Callable[[ModelReading], float]) -> Metric:
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            for model in models:
                family.add_metric([model.model], value(model))
            return family

        def counter(name: str, text: str, value: Callable[[ModelReading], float]) -> Metric:
            family = CounterMetricFamily(name, text, labels=["model_name"])
            for model in models:
                family.add_metric([model.model], value(model))
            return family

        unloads = CounterMetricFamily(
            "erllama_model_unloads", "Unloads of a model.", labels=["model_name", "reason"]
        )
        for model in models:
            for reason, n in model.unloads.items():
                unloads.add_metric([model.model, reason], n)
        return [
            gauge("vllm:num_requests_running", "Requests that compute.", lambda model: model.running),
            gauge("vllm:num_requests_waiting", "Requests that wait.", lambda model: model.waiting),
            gauge("erllama_model_loaded", "Whether a model is loaded.", lambda model: model.is_loaded),
            gauge(
                "erllama_model_slots", "Requests that a loaded model can run at once.", lambda model: model.slots
            ),
            gauge("erllama_model_memory_bytes", "Memory of a model.", lambda model: model.memory),
            counter("erllama_model_loads", "Loads of a model.", lambda model: model.loads),
            counter("erllama_model_load_failures", "Loads that failed.", lambda model: model.load_failures),
            unloads,
        ]
