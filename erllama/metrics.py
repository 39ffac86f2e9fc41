"""Metrics for Prometheus: what the loaded models and their caches count, read when somebody scrapes.

`register()` adds a collector to a registry of prometheus_client. It keeps no
counts of its own: a scrape reads the counters that models and caches have
anyway, and waits for no model. Nothing listens on a network: serving the
registry is the caller's choice. Needs `pip install erllama[metrics]`; importing
this module without it raises OptionError.
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
from erllama.engine.metrics import BUCKETS, Histogram
from erllama.errors import OptionError

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector, CollectorRegistry
except ImportError as error:
    raise OptionError(f"erllama.metrics needs prometheus-client: pip install erllama[metrics] ({error})") from error

__all__ = ["MetricsCollector", "register", "unregister"]

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class _Count(NamedTuple):
    """A counter of a model: its metric, the attribute of EngineMetrics, and what it means."""

    metric: str
    attribute: str
    meaning: str


_MODEL_COUNTS = (
    _Count("requests_refused", "refused", "Requests that the full queue turned away."),
    _Count("prompt_tokens", "prompt_tokens", "Tokens of the prompts of requests that entered the context."),
    _Count("shared_tokens", "shared_tokens", "Prompt tokens that came from cells of other sequences."),
    _Count("cached_tokens", "cached_tokens", "Prompt tokens that came from the cache."),
    _Count("prefilled_tokens", "prefilled_tokens", "Tokens computed in slices of prefill."),
    _Count("decoded_tokens", "decoded_tokens", "Tokens computed one at a time."),
    _Count("drafted_tokens", "drafted_tokens", "Tokens computed ahead, by speculation."),
    _Count("accepted_tokens", "accepted_tokens", "Of the tokens computed ahead, those that came."),
    _Count("ticks", "ticks", "Decodes."),
    _Count("preemptions", "preempted", "Times that a request gave its cells to others, and waited."),
)

_CACHE_COUNTS = {
    "misses": "Requests of whose prompt nothing was cached.",
    "tokens_reused": "Prompt tokens that need not be computed.",
    "saves_dropped": "Blocks that were not stored: too much waited to be written, or there was no room.",
    "duplicates_dropped": "Saves of blocks that were stored already.",
    "tails_superseded": "Short blocks given up for a longer one that holds their tokens.",
    "promotions": "Blocks copied into another tier because they were used.",
    "corrupt_files": "Stored files that failed their check and were set aside.",
    "disk_errors": "Reads, writes and openings of storage that failed.",
    "restore_errors": "Stored blocks that a backend refused.",
    "faults": "Times that the cache failed for a reason nobody foresaw.",
    "pressure_evictions": "Evictions under memory pressure.",
    "lookup_seconds": "Time spent looking prompts up.",
    "load_seconds": "Time spent reading stored blocks.",
    "pack_seconds": "Time spent taking blocks out of contexts.",
    "write_seconds": "Time spent writing to slower tiers.",
}
# What a counter's name begins with, where the rest of it is a label: "hits_exact", "bytes_ram".
_CACHE_GROUPS = ("hits", "saves", "evictions", "bytes", "blocks")


class MetricsCollector(Collector):
    """Gives a scrape the metrics of every loaded model, and of every cache that one of them uses.

    Thread-safe. Reads plain counters; takes the locks of caches, never one that a decode holds.
    """

    def __init__(self) -> None:
        self._names = _CacheNames()

    def describe(self) -> Iterable[Family]:
        """Every metric there is, without values."""
        return _families().values()

    def collect(self) -> Iterable[Family]:
        """Every metric as of now."""
        families = _families()
        models = list_models()
        for model in models:
            _add_model(families, model)
        for cache in dict.fromkeys(model.cache for model in models):
            status = cache.tiers()
            _add_cache(families, self._names.name(cache, status), cache, status)
        return families.values()


class _CacheNames:
    """Names for caches, which a cache keeps as long as it lives."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._names: weakref.WeakKeyDictionary[Cache, str] = weakref.WeakKeyDictionary()

    def name(self, cache: Cache, tiers: Sequence[TierStatus]) -> str:
        """The first directory of the slowest tier, or what it is instead; with a number where another has that."""
        with self._lock:
            name = self._names.get(cache)
            if name is None:
                stores = [status for status in tiers if status.tier != "live"]
                place = next((status.place for status in stores if status.tier == stores[-1].tier), "none")
                taken = set(self._names.values())
                numbered = (place if n == 1 else f"{place} ({n})" for n in count(1))
                name = next(name for name in numbered if name not in taken)
                self._names[cache] = name
            return name


# --- the metrics there are ----------------------------------------------------------------------


def _families() -> dict[str, Family]:
    """Every metric, without values, by its name short of "erllama_"."""
    families: dict[str, Family] = {}

    def counter(name: str, meaning: str, *labels: str) -> None:
        families[name] = CounterMetricFamily(f"erllama_{name}", meaning, labels=labels)

    def gauge(name: str, meaning: str, *labels: str) -> None:
        families[name] = GaugeMetricFamily(f"erllama_{name}", meaning, labels=labels)

    def histogram(name: str, meaning: str, *labels: str) -> None:
        families[name] = HistogramMetricFamily(f"erllama_{name}", meaning, labels=labels)

    counter("requests_finished", "Requests that ended with a reply.", "model", "reason")
    counter("requests_failed", "Requests that ended with an error.", "model", "error")
    for metric, _, meaning in _MODEL_COUNTS:
        counter(metric, meaning, "model")
    gauge("queue_depth", "Requests that are admitted.", "model")
    gauge("pending_requests", "Requests that wait.", "model")
    histogram("time_to_first_token_seconds", "From submission to the first token.", "model")
    histogram("time_between_tokens_seconds", "From token to token of a reply.", "model")

    counter("cache_hits", "Requests of whose prompt something was cached.", "cache", "kind")
    counter("cache_saves", "Blocks given to the cache, by why.", "cache", "reason")
    counter("cache_evictions", "Blocks evicted.", "cache", "tier")
    for name, meaning in _CACHE_COUNTS.items():
        counter(f"cache_{name}", meaning, "cache")
    counter("cache_written_bytes", "Bytes written to slower tiers.", "cache")
    gauge("cache_pending_bytes", "Bytes that wait to be written.", "cache")
    gauge("cache_bytes", "Bytes held.", "cache", "tier")
    gauge("cache_blocks", "Blocks held.", "cache", "tier")
    gauge("cache_budget_bytes", "Most bytes that may be held.", "cache", "tier")
    gauge("cache_read_only_directories", "Directories that are read and never written.", "cache")
    gauge("cache_unusable_roots", "Directories, or tiers of your own, that cannot be used now.", "cache", "tier")
    return families


# --- their values -------------------------------------------------------------------------------


def _add_model(families: dict[str, Family], model: Model) -> None:
    metrics, id = model.metrics, model.id
    # Copied in one step each: the model's thread writes meanwhile.
    for reason, n in metrics.finished.copy().items():
        _add(families["requests_finished"], n, id, reason)
    for error, n in metrics.failed.copy().items():
        _add(families["requests_failed"], n, id, error)
    for metric, attribute, _ in _MODEL_COUNTS:
        _add(families[metric], getattr(metrics, attribute), id)
    _add(families["queue_depth"], model.queue_depth, id)
    _add(families["pending_requests"], model.pending, id)
    _add_histogram(families["time_to_first_token_seconds"], metrics.first_token, id)
    _add_histogram(families["time_between_tokens_seconds"], metrics.between_tokens, id)


def _add_histogram(family: Family, histogram: Histogram, *labels: str) -> None:
    assert isinstance(family, HistogramMetricFamily)
    # The sum first: then it has nothing that is not counted, as what is observed is counted before it is summed.
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
    # A thread that was not forked may have held it.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
_registered: weakref.WeakKeyDictionary[CollectorRegistry, MetricsCollector] = weakref.WeakKeyDictionary()


def register(registry: CollectorRegistry | None = None) -> MetricsCollector:
    """Have a registry tell of the models and caches of this process, now and later. Idempotent.

    Args:
        registry: of prometheus_client; None for its default one.

    Returns:
        the collector; the same where it was registered before.

    Raises:
        OptionError: `registry` is none, or has metrics of these names from somewhere else.
    """
    registry = _checked(registry)
    with _lock:
        known = _registered.get(registry)
        collector = known or MetricsCollector()
        try:
            registry.register(collector)
        except ValueError as error:
            if known is None:
                raise OptionError(f"the registry has metrics of these names; give another ({error})") from error
        _registered[registry] = collector
        return collector


def unregister(registry: CollectorRegistry | None = None) -> None:
    """Undo `register`. Idempotent."""
    registry = _checked(registry)
    with _lock:
        collector = _registered.pop(registry, None)
        if collector is not None:
            try:
                registry.unregister(collector)
            except KeyError:  # it was taken out by hand
                pass


def _checked(registry: object) -> CollectorRegistry:
    if registry is None:
        return REGISTRY
    if not isinstance(registry, CollectorRegistry):
        raise OptionError(f"registry={registry!r}; give a prometheus_client.CollectorRegistry, or None")
    return registry
