"""`/metrics`: Prometheus metrics of the server, its models and caches, and llama-server's own.

The format is OpenMetrics if the client accepts it, or else Prometheus text. llama-server's metrics have the prefix
`llamacpp:` and no labels: they are sums over all models of the server.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import psutil
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

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
    if call.key is not None and call.key.models is not None:
        raise ApiError("permission", "the metrics are of all models; use a key that may use all of them")
    encode, content_type = choose_encoder(call.request.headers.get("accept", ""))
    own = _render(_llama_metrics(call.server), "openmetrics" in content_type)
    response = Response(own.encode() + encode(call.server.metrics.registry), headers={"content-type": content_type})
    started = str(int(psutil.Process().create_time()))
    # Spelled as llama-server does. Some clients compare the letters' case, which Starlette would change.
    response.raw_headers.append((b"Process-Start-Time-Unix", started.encode()))
    return response


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
    models = [served.model for served in server.models.loaded()]
    metrics, ended = [model.metrics for model in models], server.models.lifecycle.ended_counts
    sums = _sums(server, "vllm:")
    n_prompt, n_cached, n_reply = (
        sums[f"vllm:{name}_total"] for name in ("prompt_tokens", "prefix_cache_hits", "generation_tokens")
    )
    prompt_seconds, reply_seconds = (
        sums[f"vllm:request_{name}_time_seconds_sum"] for name in ("prefill", "decode")
    )
    n_computed = n_prompt - n_cached
    n_encoded = sums["vllm:request_prompt_tokens_count"] - sums["vllm:request_success_total"]
    n_decodes, n_rows = (
        ended[name] + sum(getattr(each, name) for each in metrics) for name in ("ticks", "decoded_tokens")
    )
    n_drafted, n_accepted, n_drafts = (
        ended[name] + sum(getattr(each, name) for each in metrics)
        for name in ("drafted_tokens", "accepted_tokens", "drafts")
    )
    counters = (
        ("prompt_tokens_total", "Prompt tokens computed.", n_computed),
        ("prompt_tokens_cached_total", "Prompt tokens reused instead of computed.", n_cached),
        ("prompt_seconds_total", "Seconds spent on prompts.", prompt_seconds),
        ("tokens_predicted_total", "Tokens of replies.", n_reply),
        ("tokens_predicted_seconds_total", "Seconds spent on replies after their first token.", reply_seconds),
        ("n_decode_total", "Decodes, and requests for embeddings or rankings.", n_decodes + n_encoded),
        ("n_tokens_max", "Tokens of the longest prompt with its replies.", server.metrics.longest),
        ("spec_decode_num_draft_tokens_total", "Tokens computed ahead.", n_drafted),
        ("spec_decode_num_accepted_tokens_total", "Tokens computed ahead that were right.", n_accepted),
        ("spec_decode_num_drafts_total", "Decodes with tokens computed ahead.", n_drafts),
    )
    gauges = (
        ("prompt_tokens_seconds", "Prompt tokens a second.", _rate(n_computed, prompt_seconds)),
        ("predicted_tokens_seconds", "Tokens of replies a second.", _rate(n_reply, reply_seconds)),
        ("requests_processing", "Requests that run.", sum(model.queue_depth for model in models)),
        ("requests_deferred", "Requests that wait.", sum(model.pending for model in models)),
        ("n_busy_slots_per_decode", "Replies that one decode continues, on average.", _rate(n_rows, n_decodes)),
    )
    return [
        _Metric(name, kind, help_text, value)
        for kind, items in (("counter", counters), ("gauge", gauges))
        for name, help_text, value in items
    ]


def _sums(server: Server, prefix: str) -> dict[str, float]:
    """Return the samples of the server's own metrics, summed over their labels."""
    sums: dict[str, float] = defaultdict(float)
    for family in server.metrics.registry.collect():
        if family.name.startswith(prefix):
            for sample in family.samples:
                sums[sample.name] += sample.value
    return sums


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0
