"""`/metrics`: Prometheus metrics of the models and caches, and llama-server's own, in the format that the client takes.

OpenMetrics if the client accepts it, or else Prometheus text. llama-server's metrics have the prefix `llamacpp:` and
no labels: they are sums over all models of the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import psutil
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry
from starlette.responses import Response

from erllama.metrics import MetricsCollector
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody
from erllama.server.llama_server.errors import ERRORS
from erllama.server.state import Server


class _Metric(NamedTuple):
    name: str
    kind: str
    help_text: str
    value: float


def endpoints() -> list[Endpoint[NoBody]]:
    """Return the endpoints of this module."""
    return [Endpoint("GET", "/metrics", NoBody, answer, ERRORS, "Return Prometheus metrics.", False, False)]


async def answer(call: Call, body: NoBody) -> Response:
    """Answer with all metrics."""
    if not call.server.options.metrics:
        raise ApiError("unsupported", "this server has no metrics; start it with the option `metrics`")
    encode, content_type = choose_encoder(call.request.headers.get("accept", ""))
    registry = CollectorRegistry()
    for collector in collectors(call.server):
        registry.register(collector)
    own = _render(_llama_metrics(call.server), "openmetrics" in content_type)
    started = str(int(psutil.Process().create_time()))
    headers = {"content-type": content_type, "process-start-time-unix": started}
    return Response(own.encode() + encode(registry), headers=headers)


def collectors(server: Server) -> Iterable[MetricsCollector]:
    """Return the collectors of metrics besides llama-server's."""
    return (MetricsCollector(),)


def _render(metrics: Sequence[_Metric], as_open_metrics: bool) -> str:
    """Return metrics as text. OpenMetrics names a counter without the end of its name."""
    lines = []
    for name, kind, help_text, value in metrics:
        name, full = f"llamacpp:{name}", f"llamacpp:{name}"
        if as_open_metrics:
            name = name.removesuffix("_total")
            kind = "gauge" if kind == "counter" and not full.endswith("_total") else kind
        lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", f"{full} {value:.17g}"]
    return "\n".join(lines) + "\n"


def _llama_metrics(server: Server) -> list[_Metric]:
    totals, models = server.totals, [served.model for served in server.models.models]
    metrics = [model.metrics for model in models]
    n_decodes = sum(each.ticks for each in metrics)
    n_rows = sum(each.decoded_tokens for each in metrics)
    counters = (
        ("prompt_tokens_total", "Prompt tokens computed.", totals.prompt_tokens),
        ("prompt_tokens_cached_total", "Prompt tokens reused instead of computed.", totals.cached_tokens),
        ("prompt_seconds_total", "Seconds spent on prompts.", totals.prompt_seconds),
        ("tokens_predicted_total", "Tokens of replies.", totals.reply_tokens),
        ("tokens_predicted_seconds_total", "Seconds spent on replies after their first token.", totals.reply_seconds),
        ("n_decode_total", "Decodes, with those of embeddings.", n_decodes + totals.embeddings),
        ("n_tokens_max", "Tokens of the longest prompt with its reply.", totals.longest),
        ("spec_decode_num_draft_tokens_total", "Tokens computed ahead.", totals.drafted),
        ("spec_decode_num_accepted_tokens_total", "Tokens computed ahead that were right.", totals.accepted),
        ("spec_decode_num_drafts_total", "Replies with tokens computed ahead.", totals.drafts),
    )
    gauges = (
        ("prompt_tokens_seconds", "Prompt tokens a second.", _rate(totals.prompt_tokens, totals.prompt_seconds)),
        ("predicted_tokens_seconds", "Tokens of replies a second.", _rate(totals.reply_tokens, totals.reply_seconds)),
        ("requests_processing", "Requests that run.", sum(model.queue_depth for model in models)),
        ("requests_deferred", "Requests that wait.", sum(model.pending for model in models)),
        ("n_busy_slots_per_decode", "Replies that one decode continues, on average.", _rate(n_rows, n_decodes)),
    )
    return [
        _Metric(name, kind, help_text, value)
        for kind, items in (("counter", counters), ("gauge", gauges))
        for name, help_text, value in items
    ]


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0
