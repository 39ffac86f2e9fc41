"""Metrics are right, follow the conventions of Prometheus, and never wait for a model."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import erllama
import erllama.metrics
from erllama.cache import Cache
from erllama.engine import Batch
from erllama.engine.backends.stub import StubBackend
from erllama.engine.metrics import BUCKETS
from support.paths import ROOT
from support.recording_backend import RecordingBackend
from support.subprocesses import must_run

DOCS = ROOT / "docs" / "metrics.md"
HISTOGRAMS = ("erllama_time_to_first_token_seconds", "erllama_time_between_tokens_seconds")


class Gated(StubBackend):
    """Signals when a decode starts, and waits until its gate is opened."""

    def __init__(self) -> None:
        super().__init__(eog_bias=-100)
        self.gate, self.decoding = threading.Event(), threading.Event()

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.decoding.set()
        assert self.gate.wait(60)
        return super().decode(batch)


class Page:
    """Scrape once. Returns the text and its parsed form."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.text = prometheus_client.generate_latest(registry).decode()
        self.families = list(text_string_to_metric_families(self.text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        (found,) = (s.value for s in self.samples if s.name == name and s.labels == labels)
        return found

    def labels(self, name: str, label: str) -> list[str]:
        return [s.labels[label] for s in self.samples if s.name == name]


class Bucketed(NamedTuple):
    bounds: list[float]
    counts: list[float]
    total: float
    count: float


def bucketed(page: Page, name: str, model: str) -> Bucketed:
    """Check that a histogram is consistent."""
    buckets = [s for s in page.samples if s.name == f"{name}_bucket" and s.labels["model"] == model]
    found = Bucketed(
        [float(s.labels["le"]) for s in buckets],
        [s.value for s in buckets],
        page.value(f"{name}_sum", model=model),
        page.value(f"{name}_count", model=model),
    )
    assert found.bounds == [*BUCKETS, float("inf")]
    assert found.counts == sorted(found.counts)
    assert found.counts[-1] == found.count
    return found


@pytest.fixture
def registry() -> CollectorRegistry:
    found = CollectorRegistry()
    erllama.metrics.register(found)
    return found


@pytest.fixture
def gated() -> Iterator[tuple[Gated, erllama.Model]]:
    """A model during a decode, with one more request waiting."""
    backend = Gated()
    with Cache() as cache, erllama.load_backend(backend, id="gated", cache=cache, n_seq_max=1) as model:
        first, second = (model.stream(prompt, max_tokens=3) for prompt in ("one", "two"))
        try:
            assert backend.decoding.wait(120)
            yield backend, model
        finally:
            backend.gate.set()
        first.result()
        second.result()


def at_once(work: Callable[[], object]) -> object:
    """Return the result of `work` in a separate thread, so that a wait for the model fails instead of hanging."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(120)
    assert found, "it waits, or raised"
    return found[0]


# --- the numbers ----------------------------------------------------------------------------


def test_model_metrics_match_the_requests_that_ran(registry: CollectorRegistry) -> None:
    backend = RecordingBackend(StubBackend(eog_bias=-100))
    with Cache() as cache, erllama.load_backend(backend, id="m", cache=cache) as model:
        model.complete("a prompt", max_tokens=10)
        model.complete("a prompt", max_tokens=10)
        model.complete("a", max_tokens=0)
        page = Page(registry)
        assert page.value("erllama_requests_finished_total", model="m", reason="length") == 3
        assert page.value("erllama_requests_refused_total", model="m") == 0
        assert page.value("erllama_prompt_tokens_total", model="m") == 8 + 8 + 1
        reused = sum(page.value(f"erllama_{how}_tokens_total", model="m") for how in ("shared", "cached"))
        computed = page.value("erllama_prefilled_tokens_total", model="m")
        assert reused == 7
        assert computed == 8 + 1 + 1
        assert page.value("erllama_decoded_tokens_total", model="m") == 9 + 9
        assert page.value("erllama_ticks_total", model="m") == len(backend.slices)
        assert page.value("erllama_preemptions_total", model="m") == 0
        assert (
            page.value("erllama_queue_depth", model="m") == page.value("erllama_pending_requests", model="m") == 0
        )
        first, between = (bucketed(page, name, "m") for name in HISTOGRAMS)
        assert (first.count, between.count) == (2, 9 + 9)
        assert first.total > 0
        assert between.total > 0
        assert model.metrics.decoded_tokens == 18


def test_failures_are_counted_by_error(registry: CollectorRegistry) -> None:
    class Failing(StubBackend):
        def decode(self, batch: Batch) -> NDArray[np.float32]:
            raise erllama.BackendError("the device went away")

    with Cache() as cache, erllama.load_backend(Failing(), id="m", cache=cache) as model:
        for _ in range(2):
            with pytest.raises(erllama.BackendError):
                model.complete("x")
        page = Page(registry)
    assert page.value("erllama_requests_failed_total", model="m", error="BackendError") == 2
    assert not page.labels("erllama_requests_finished_total", "reason")


def test_preemptions_are_counted(registry: CollectorRegistry) -> None:
    backend = StubBackend(n_ctx=192, eog_bias=-100)
    with Cache(block_size=16) as cache, erllama.load_backend(backend, id="m", cache=cache) as model:
        streams = [model.stream([i] * 20, max_tokens=100) for i in range(3)]
        for stream in streams:
            assert len(stream.result().tokens) == 100
        page = Page(registry)
        assert page.value("erllama_preemptions_total", model="m") == model.metrics.preempted > 0


def test_cache_metrics_match_the_cache_counters(registry: CollectorRegistry, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    with (
        Cache(ram="1MiB", disk=directory, disk_quota="1GiB") as cache,
        erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model,
    ):
        model.complete("x" * 600, max_tokens=5)
        model.evict()
        model.complete("x" * 600, max_tokens=5)
        cache.flush()
        page, counters = Page(registry), cache.counters()
        name = str(directory)
        assert page.value("erllama_cache_hits_total", cache=name, kind="exact") == 1
        assert page.value("erllama_cache_misses_total", cache=name) == 1
        assert page.value("erllama_cache_tokens_reused_total", cache=name) == 599
        assert page.value("erllama_cache_saves_total", cache=name, reason="cold") == counters["saves_cold"] > 0
        assert page.value("erllama_cache_evictions_total", cache=name, tier="disk") == 0
        assert page.value("erllama_cache_written_bytes_total", cache=name) == counters["bytes_written"] > 0
        assert page.value("erllama_cache_pending_bytes", cache=name) == 0
        for tier in ("ram", "disk"):
            assert page.value("erllama_cache_bytes", cache=name, tier=tier) == counters[f"bytes_{tier}"] > 0
            assert page.value("erllama_cache_blocks", cache=name, tier=tier) == counters[f"blocks_{tier}"] > 0
            assert page.value("erllama_cache_unusable_roots", cache=name, tier=tier) == 0
        assert page.value("erllama_cache_budget_bytes", cache=name, tier="ram") == 2**20
        assert page.value("erllama_cache_budget_bytes", cache=name, tier="disk") == 2**30
        assert page.value("erllama_cache_lookup_seconds_total", cache=name) > 0


def test_directories_of_a_tier_share_a_budget_and_report_errors(
    registry: CollectorRegistry, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    roots = {tmp_path / "a": "1GiB", tmp_path / "file" / "b": "2GiB"}
    with Cache(disk=roots) as cache, erllama.load_backend(StubBackend(), cache=cache):
        page = Page(registry)
    assert page.value("erllama_cache_budget_bytes", cache=str(tmp_path / "a"), tier="disk") == 3 * 2**30
    assert page.value("erllama_cache_unusable_roots", cache=str(tmp_path / "a"), tier="disk") == 1


def test_every_counter_of_a_cache_has_a_metric(registry: CollectorRegistry) -> None:
    with Cache() as cache, erllama.load_backend(StubBackend(), cache=cache):
        page, counters = Page(registry), cache.counters()
    ours = ("erllama_cache_budget_bytes", "erllama_cache_unusable_roots")  # of tiers()
    assert len(counters) == sum(s.name.startswith("erllama_cache_") and s.name not in ours for s in page.samples)


# --- several models and caches -----------------------------------------------------------------


def test_a_shared_cache_is_reported_once(registry: CollectorRegistry) -> None:
    with (
        Cache() as shared,
        Cache() as own,
        erllama.load_backend(StubBackend(eog_bias=-100), id="a", cache=shared) as a,
        erllama.load_backend(StubBackend(eog_bias=-100), id="b", cache=shared) as b,
        erllama.load_backend(StubBackend(eog_bias=-100), id='c "\\\n', cache=own) as c,
    ):
        for model in (a, b, c):
            model.complete("a prompt", max_tokens=1)
        page = Page(registry)
        assert page.labels("erllama_ticks_total", "model") == ["a", "b", 'c "\\\n']
        assert page.labels("erllama_cache_misses_total", "cache") == ["ram", "ram (2)"]
        assert page.value("erllama_cache_misses_total", cache="ram (2)") == 1
        for model in (a, b):
            model.unload()
        page = Page(registry)
        assert page.labels("erllama_ticks_total", "model") == ['c "\\\n']
        assert page.labels("erllama_cache_misses_total", "cache") == ["ram (2)"], "a cache keeps its name"


def test_a_reloaded_model_starts_its_counters_at_zero(registry: CollectorRegistry) -> None:
    for _ in range(2):
        with Cache() as cache, erllama.load_backend(StubBackend(), id="m", cache=cache) as model:
            model.complete("x", max_tokens=0)
            assert Page(registry).value("erllama_prompt_tokens_total", model="m") == 1
    assert "erllama_prompt_tokens_total" in Page(registry).text
    assert not Page(registry).samples


def test_closed_caches_and_caches_without_tiers_are_exported(registry: CollectorRegistry) -> None:
    with Cache(ram=0) as none, Cache() as cache, erllama.load_backend(StubBackend(), cache=none):
        with erllama.load_backend(StubBackend(), cache=cache) as model:
            cache.close()
            model.complete("x", max_tokens=1)
            page = Page(registry)
    assert page.labels("erllama_cache_misses_total", "cache") == ["none", "none (2)"]


# --- histograms ------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1000) | st.sampled_from(BUCKETS), max_size=40))
def test_a_bucket_counts_values_up_to_its_bound(seconds: list[float]) -> None:
    registry = CollectorRegistry()
    erllama.metrics.register(registry)
    with Cache(ram=0) as cache, erllama.load_backend(StubBackend(), id="m", cache=cache) as model:
        for value in seconds:
            model.metrics.first_token.observe(value)
        found = bucketed(Page(registry), HISTOGRAMS[0], "m")
    assert found.counts == [sum(value <= bound for value in seconds) for bound in found.bounds]
    assert found.total == pytest.approx(sum(seconds))


def test_histograms_are_consistent_while_they_are_updated(registry: CollectorRegistry) -> None:
    stop = threading.Event()
    with Cache(ram=0) as cache, erllama.load_backend(StubBackend(), id="m", cache=cache) as model:

        def observe() -> None:
            while not stop.is_set():
                model.metrics.between_tokens.observe(0.5)

        writer = threading.Thread(target=observe)
        writer.start()
        try:
            last = 0.0
            for _ in range(200):
                found = bucketed(Page(registry), HISTOGRAMS[1], "m")
                assert found.total <= found.count * 0.5, "the sum covers only counted values"
                assert found.count >= last
                last = found.count
        finally:
            stop.set()
            writer.join()


# --- nothing waits for a decode -------------------------------------------------------------------


def test_a_scrape_during_a_decode_does_not_wait(
    registry: CollectorRegistry, gated: tuple[Gated, erllama.Model]
) -> None:
    backend, _ = gated
    page = at_once(lambda: Page(registry))
    assert isinstance(page, Page)
    assert not backend.gate.is_set()
    assert page.value("erllama_queue_depth", model="gated") == 1
    assert page.value("erllama_pending_requests", model="gated") == 1
    assert page.value("erllama_ticks_total", model="gated") == 0


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda model: model.phase, "prefilling"),
        (lambda model: model.pending, 1),
        (lambda model: model.queue_depth, 1),
        (lambda model: model.last_cache_hit, erllama.CacheHit("cold", None, 0)),
        (lambda model: (model.info.id, model.info.phase, model.info.pending), ("gated", "prefilling", 1)),
        (lambda model: model.metrics.prompt_tokens, 3),
        (lambda model: model.cached_prefix("one"), 0),
        (lambda model: erllama.queue_depth(), 1),
    ],
    ids=["phase", "pending", "queue_depth", "last_cache_hit", "info", "metrics", "cached_prefix", "of all models"],
)
def test_reading_a_models_state_during_a_decode_does_not_wait(
    gated: tuple[Gated, erllama.Model], read: Callable[[erllama.Model], object], expected: object
) -> None:
    backend, model = gated
    assert at_once(lambda: read(model)) == expected
    assert not backend.gate.is_set()


def test_refused_requests_are_counted(registry: CollectorRegistry) -> None:
    backend = Gated()
    with Cache() as cache, erllama.load_backend(backend, id="m", cache=cache, n_seq_max=1, max_pending=1) as model:
        running = model.stream("one", max_tokens=1)
        assert backend.decoding.wait(120)
        waiting = model.stream("two", max_tokens=1)
        with pytest.raises(erllama.QueueFull):
            model.stream("three", max_tokens=1)
        assert Page(registry).value("erllama_requests_refused_total", model="m") == 1
        backend.gate.set()
        running.result()
        waiting.result()


def test_scrapes_during_loading_and_unloading_are_complete(registry: CollectorRegistry) -> None:
    stop = threading.Event()
    pages: list[Page] = []

    def scrape() -> None:
        while not stop.is_set():
            pages.append(Page(registry))

    scrapers = [threading.Thread(target=scrape) for _ in range(2)]
    for scraper in scrapers:
        scraper.start()
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with Cache() as cache, erllama.load_backend(StubBackend(), id="m", cache=cache) as model:
                model.complete("x", max_tokens=5)
    finally:
        stop.set()
        for scraper in scrapers:
            scraper.join()
    for page in pages:
        assert page.labels("erllama_ticks_total", "model") in ([], ["m"])
        for name in HISTOGRAMS:
            if page.labels(f"{name}_count", "model"):
                bucketed(page, name, "m")


# --- registries ----------------------------------------------------------------------------------------


def test_registering_twice_has_no_further_effect(registry: CollectorRegistry) -> None:
    collector = erllama.metrics.register(registry)
    assert erllama.metrics.register(registry) is collector
    with Cache() as cache, erllama.load_backend(StubBackend(), cache=cache):
        assert len(Page(registry).labels("erllama_ticks_total", "model")) == 1
    erllama.metrics.unregister(registry)
    erllama.metrics.unregister(registry)
    assert Page(registry).text == ""
    collector = erllama.metrics.register(registry)
    registry.unregister(collector)
    assert erllama.metrics.register(registry) is collector
    assert "erllama_ticks_total" in Page(registry).text
    registry.unregister(collector)
    erllama.metrics.unregister(registry)


def test_the_default_registry_is_used_by_default() -> None:
    collector = erllama.metrics.register()
    try:
        assert isinstance(collector, erllama.metrics.MetricsCollector)
        assert "erllama_ticks_total" in Page(prometheus_client.REGISTRY).text
    finally:
        erllama.metrics.unregister()
    assert "erllama_ticks_total" not in Page(prometheus_client.REGISTRY).text


def test_an_unusable_registry_raises_a_typed_error() -> None:
    taken = CollectorRegistry()
    prometheus_client.Counter("erllama_ticks", "Somebody else's.", registry=taken)
    with pytest.raises(erllama.OptionError, match="already has metrics of these names"):
        erllama.metrics.register(taken)
    with pytest.raises(erllama.OptionError, match="CollectorRegistry, or None"):
        erllama.metrics.register("default")  # type: ignore[arg-type]


def test_one_metric_can_be_scraped_alone(registry: CollectorRegistry) -> None:
    with Cache() as cache, erllama.load_backend(StubBackend(), cache=cache):
        found = list(registry.restricted_registry(["erllama_ticks_total"]).collect())
    assert [sample.name for family in found for sample in family.samples] == ["erllama_ticks_total"]


def test_without_prometheus_client_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "erllama.metrics")
    with pytest.raises(
        ImportError, match=r"erllama.metrics needs prometheus-client: pip install 'erllama\[metrics\]'"
    ) as caught:
        __import__("erllama.metrics")
    assert isinstance(caught.value, erllama.MissingPackage)


def test_prometheus_client_is_imported_only_for_metrics() -> None:
    must_run(
        """
        import sys
        sys.modules["prometheus_client"] = None
        import erllama
        from erllama.engine.backends.stub import StubBackend
        with erllama.load_backend(StubBackend(), cache=erllama.Cache()) as model:
            model.complete("x", max_tokens=1)
            assert model.metrics.ticks == 1
        """
    )


# --- the documentation ----------------------------------------------------------------------------------


def test_the_documented_metrics_match_the_exported_ones(registry: CollectorRegistry) -> None:
    with Cache() as cache, erllama.load_backend(StubBackend(), cache=cache) as model:
        model.metrics.count_finished("stop")
        model.metrics.count_failed(ValueError())
        found = {}
        for family in Page(registry).families:
            shared = {"model", "cache", "le"}
            labels = sorted({label for sample in family.samples for label in sample.labels} - shared)
            name = family.name + ("_total" if family.type == "counter" else "")
            found[name] = (family.type, "".join(f"`{label}`" for label in labels))
    rows = re.findall(r"^\| `(erllama_\w+)` \| (\w+) \| ?(\S*) ?\| .+ \|$", DOCS.read_text(), re.MULTILINE)
    assert {name: (kind, labels) for name, kind, labels in rows} == found
    assert len(rows) == len(found)


def test_the_metrics_example_runs(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").symlink_to(tiny_gguf)
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(prometheus_client, "start_http_server", lambda port, addr: asked.append((port, addr)))
    code = DOCS.read_text().partition("```python\n")[2].partition("```")[0]
    try:
        exec(code, {})
    finally:
        erllama.metrics.unregister()
    assert asked == [(9090, "127.0.0.1")]
