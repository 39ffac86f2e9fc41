"""Prometheus metrics of the loaded models and their caches.

`register()` adds a collector to a registry of prometheus_client. The collector keeps no counts: a scrape
reads the counters of models and caches and never waits for a model. The module opens no network port; the caller
decides how to serve the registry. Needs `pip install 'erllama[metrics]'`; without it, importing this module raises
`MissingPackage`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from itertools import accumulate, count
from typing import NamedTuple

from erllama._model.model import Model
from erllama._model.registry import list_models
from erllama.cache import Cache, TierStatus
from erllama.checks import import_optional
from erllama.engine.metrics import BUCKETS, Histogram
from erllama.errors import OptionError

import_optional("prometheus_client", needed_by=__name__, package="prometheus-client", install="'erllama[metrics]'")
from prometheus_client import REGISTRY  # noqa: E402
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily  # noqa: E402
from prometheus_client.registry import Collector, CollectorRegistry  # noqa: E402

__all__ = ["MetricsCollector", "register", "unregister"]

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class _Count(NamedTuple):
    """A counter of a model: its metric's name, the attribute of EngineMetrics, and the help text."""

    metric: str
    attribute: str
    help_text: str


_MODEL_COUNTS = (
    _Count("requests_refused", "refused", "Requests refused because the queue was full."),
    _Count("prompt_tokens", "prompt_tokens", "Prompt tokens of admitted requests."),
    _Count("shared_tokens", "shared_tokens", "Prompt tokens taken from cells of other sequences."),
    _Count("cached_tokens", "cached_tokens", "Prompt tokens taken from the cache."),
    _Count("prefilled_tokens", "prefilled_tokens", "Tokens computed in slices of prefill."),
    _Count("decoded_tokens", "decoded_tokens", "Tokens computed one at a time."),
    _Count("drafted_tokens", "drafted_tokens", "Tokens computed ahead by speculation."),
    _Count("accepted_tokens", "accepted_tokens", "Tokens computed ahead that became part of a reply."),
    _Count("ticks", "ticks", "Decodes."),
    _Count("preemptions", "preempted", "Times that a request released its cells to others and waited."),
)

_CACHE_COUNTS = {
    "misses": "Requests with no cached prompt tokens.",
    "tokens_reused": "Prompt tokens taken from the cache instead of computed.",
    "saves_dropped": "Blocks not stored because the write queue or the tier was full.",
    "duplicates_dropped": "Saves of blocks that were already stored.",
    "tails_superseded": "Short blocks replaced by a longer one that holds their tokens.",
    "promotions": "Blocks copied into another tier because they were used.",
    "corrupt_files": "Stored files that failed their check and were moved to damaged/.",
    "disk_errors": "Failures to open, read or write storage.",
    "restore_errors": "Stored blocks that a backend could not restore.",
    "faults": "Unexpected failures of the cache.",
    "pressure_evictions": "Evictions under memory pressure.",
    "pins_refused": "Pins refused because pins would protect too many bytes.",
    "event_batches": "Batches of KV events sent.",
    "event_overflows": "Times that too many changes waited for KV events, so that all blocks were announced again.",
    "event_replays": "Replays of KV events that subscribers asked for.",
    "remote_reads": "Blocks read from the remote tier.",
    "remote_reads_late": "Fetches from the remote tier that exceeded their deadline.",
    "remote_reads_skipped": "Fetches not begun because computing is faster than the remote tier.",
    "remote_bytes_read": "Bytes read from the remote tier.",
    "remote_signatures_refused": "Blocks of the remote tier without a right signature.",
    "remote_manifests_refused": "Manifests of the remote tier that are damaged or without a right signature.",
    "remote_unknown_keys": "Manifests of the remote tier with content that is encrypted with keys of others.",
    "remote_uploads_lost": "Blocks that could not be uploaded.",
    "remote_expired": "Blocks of the remote tier removed after their lifetime.",
    "remote_outages": "Times that the remote tier stopped answering.",
    "lookup_seconds": "Seconds spent looking up prompts.",
    "load_seconds": "Seconds spent reading stored blocks.",
    "pack_seconds": "Seconds spent copying blocks out of contexts.",
    "write_seconds": "Seconds spent writing to slower tiers.",
}
# Counters named "<group>_<label>", such as "hits_exact" and "bytes_ram".
_CACHE_GROUPS = ("hits", "saves", "evictions", "bytes", "blocks")


class MetricsCollector(Collector):
    """Collects the metrics of every loaded model, and of every cache that a loaded model uses.

    Thread-safe. Reads plain counters and takes the locks of caches, but no lock that a decode holds.
    """

    def __init__(self) -> None:
        self._names = _CacheNames()

    def describe(self) -> Iterable[Family]:
        """Return every metric, without values."""
        return _families().values()

    def collect(self) -> Iterable[Family]:
        """Return every metric with its current values."""
        families = _families()
        models = list_models()
        for model in models:
            _add_model(families, model)
        for cache in dict.fromkeys(model.cache for model in models):
            status = cache.tiers()
            _add_cache(families, self._names.name(cache, status), cache, status)
        return families.values()


class _CacheNames:
    """Label values for caches. A cache keeps its name for its lifetime."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._names: weakref.WeakKeyDictionary[Cache, str] = weakref.WeakKeyDictionary()

    def name(self, cache: Cache, tiers: Sequence[TierStatus]) -> str:
        """Return the first directory of the slowest tier, or its location; with a number if the name is taken."""
        with self._lock:
            name = self._names.get(cache)
            if name is None:
                stores = [status for status in tiers if status.tier != "live"]
                location = next((status.location for status in stores if status.tier == stores[-1].tier), "none")
                taken = set(self._names.values())
                numbered = (location if n == 1 else f"{location} ({n})" for n in count(1))
                name = next(name for name in numbered if name not in taken)
                self._names[cache] = name
            return name


# --- definitions ----------------------------------------------------------------------


def _families() -> dict[str, Family]:
    """Return every metric, without values, keyed by its name without "erllama_"."""
    families: dict[str, Family] = {}

    def counter(name: str, help_text: str, *labels: str) -> None:
        families[name] = CounterMetricFamily(f"erllama_{name}", help_text, labels=labels)

    def gauge(name: str, help_text: str, *labels: str) -> None:
        families[name] = GaugeMetricFamily(f"erllama_{name}", help_text, labels=labels)

    def histogram(name: str, help_text: str, *labels: str) -> None:
        families[name] = HistogramMetricFamily(f"erllama_{name}", help_text, labels=labels)

    counter("requests_finished", "Requests that ended with a reply.", "model", "reason")
    counter("requests_failed", "Requests that ended with an error.", "model", "error")
    for metric, _, help_text in _MODEL_COUNTS:
        counter(metric, help_text, "model")
    gauge("queue_depth", "Admitted requests.", "model")
    gauge("threads", "Threads in use for decoding and for prefill.", "model", "work")
    gauge("pending_requests", "Waiting requests.", "model")
    histogram("time_to_first_token_seconds", "Seconds from submission to the first token.", "model")
    histogram("time_between_tokens_seconds", "Seconds between tokens of a reply.", "model")

    counter("cache_hits", "Requests with cached prompt tokens.", "cache", "kind")
    counter("cache_saves", "Blocks saved to the cache, by reason.", "cache", "reason")
    counter("cache_evictions", "Blocks evicted.", "cache", "tier")
    for name, help_text in _CACHE_COUNTS.items():
        counter(f"cache_{name}", help_text, "cache")
    counter("cache_written_bytes", "Bytes written to slower tiers.", "cache")
    gauge("cache_pending_bytes", "Bytes waiting to be written.", "cache")
    gauge("cache_pinned_bytes", "Bytes that pins protect from eviction.", "cache")
    gauge("cache_bytes", "Bytes stored.", "cache", "tier")
    gauge("cache_blocks", "Blocks stored.", "cache", "tier")
    gauge("cache_budget_bytes", "Maximum number of stored bytes.", "cache", "tier")
    gauge("cache_read_only_directories", "Directories that are read but never written.", "cache")
    gauge("cache_unusable_roots", "Directories and custom tiers that cannot be used now.", "cache", "tier")
    return families


# --- values -------------------------------------------------------------------------------


def _add_model(families: dict[str, Family], model: Model) -> None:
    metrics, id = model.metrics, model.id
    # copy() is one step of the interpreter; the model thread may write at the same time.
    for reason, n in metrics.finished.copy().items():
        _add(families["requests_finished"], n, id, reason)
    for error, n in metrics.failed.copy().items():
        _add(families["requests_failed"], n, id, error)
    for metric, attribute, _ in _MODEL_COUNTS:
        _add(families[metric], getattr(metrics, attribute), id)
    _add(families["queue_depth"], model.queue_depth, id)
    info = model.info
    _add(families["threads"], info.n_threads, id, "decode")
    _add(families["threads"], info.n_threads_batch, id, "prefill")
    _add(families["pending_requests"], model.pending, id)
    _add_histogram(families["time_to_first_token_seconds"], metrics.first_token, id)
    _add_histogram(families["time_between_tokens_seconds"], metrics.between_tokens, id)


def _add_histogram(family: Family, histogram: Histogram, *labels: str) -> None:
    assert isinstance(family, HistogramMetricFamily)
    # Read the sum first: an observation is counted before it is summed, so the sum never includes an uncounted one.
    total, counts = histogram.total, histogram.counts.copy()
    bounds = [*map(str, BUCKETS), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)


def _add_cache(families: dict[str, Family], label: str, cache: Cache, tiers: Sequence[TierStatus]) -> None:
    for name, value in cache.counters().items():
        group, _, rest = name.partition("_")
        if name == "bytes_written":
            _add(families["cache_written_bytes"], value, label)
        elif name == "bytes_pending":
            _add(families["cache_pending_bytes"], value, label)
        elif name == "bytes_pinned":
            _add(families["cache_pinned_bytes"], value, label)
        elif name not in _CACHE_COUNTS and group in _CACHE_GROUPS:
            _add(families[f"cache_{group}"], value, label, rest)
        else:
            _add(families[f"cache_{name}"], value, label)
    for tier in dict.fromkeys(status.tier for status in tiers):
        roots = [status for status in tiers if status.tier == tier]
        _add(families["cache_budget_bytes"], sum(root.budget for root in roots), label, tier)
        _add(families["cache_unusable_roots"], sum(root.error is not None for root in roots), label, tier)


def _add(family: Family, value: float, *labels: str) -> None:
    assert not isinstance(family, HistogramMetricFamily)
    family.add_metric(labels, value)


# --- registries -----------------------------------------------------------------------------------

_lock = threading.RLock()


def _after_fork_in_child() -> None:
    # Another thread, which does not exist in the child, may have held the lock.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
_registered: weakref.WeakKeyDictionary[CollectorRegistry, MetricsCollector] = weakref.WeakKeyDictionary()


def register(registry: CollectorRegistry | None = None) -> MetricsCollector:
    """Add a collector of this process's models and caches, present and future, to a registry. Idempotent.

    Args:
        registry: a registry of prometheus_client; None for its default registry.

    Returns:
        The collector. A second call with the same registry returns the same collector.

    Raises:
        OptionError: `registry` is not a registry, or another collector in it has metrics of these names.
    """
    registry = _checked(registry)
    with _lock:
        registered = _registered.get(registry)
        collector = registered or MetricsCollector()
        try:
            registry.register(collector)
        except ValueError as error:
            if registered is None:
                raise OptionError(
                    f"the registry already has metrics of these names; pass another registry ({error})"
                ) from error
        _registered[registry] = collector
        return collector


def unregister(registry: CollectorRegistry | None = None) -> None:
    """Remove the collector that `register` added. Idempotent."""
    registry = _checked(registry)
    with _lock:
        collector = _registered.pop(registry, None)
        if collector is not None:
            try:
                registry.unregister(collector)
            except KeyError:  # the caller has already unregistered it
                pass


def _checked(registry: object) -> CollectorRegistry:
    if registry is None:
        return REGISTRY
    if not isinstance(registry, CollectorRegistry):
        raise OptionError(f"registry={registry!r}; pass a prometheus_client.CollectorRegistry, or None")
    return registry
