"""Signals at any moment: a handler's exception ends the call, and memory, index and files stay consistent.

SIGINT raises KeyboardInterrupt. SIGTERM has a handler as operators write it: it reads `counters()` and `tiers()`,
writes what waits or closes the cache now and then, and raises SystemExit.

ERLLAMA_SIGNALS says how many signals end a call; `make stress`: more.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from erllama.cache import Cache
from erllama.cache.uninterrupted import running as running_calls
from erllama.cache.uninterrupted import uninterrupted
from support.storage.blocks import SIZE, save
from support.storage.processes import bytes_in, killed_at_end, start_python
from support.threads import wait_until

SIGNALS = int(os.environ.get("ERLLAMA_SIGNALS", "120"))
QUOTA, RAM = 300_000, 100_000

INTERRUPTED = f"""
    import gc, logging, sqlite3, threading
    from erllama.cache import uninterrupted
    logging.getLogger("erllama").setLevel(logging.CRITICAL)
    root, n_signals, dice = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    armed, caught = False, {{signal.SIGINT: 0, signal.SIGTERM: 0}}
    cache = None

    def made():
        return Cache(block_size=SIZE, ram=dice.choice((0, {RAM})), disk=root, disk_quota={QUOTA}, watch=False)

    def on_signal(number, frame):
        global armed
        if not armed:
            return  # between two calls
        armed = False
        caught[number] += 1
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if cache is not None:
            cache.counters(), cache.tiers()
            if caught[number] % 100 == 0:
                cache.close()
            elif caught[number] % 10 == 0:
                cache.flush(0.2)
        raise SystemExit

    def attempt(call):
        global armed
        try:
            armed = True
            found = call()
            armed = False
            return found
        except (KeyboardInterrupt, SystemExit):
            return None

    def send():
        sending = random.Random(1)
        while sum(caught.values()) < n_signals:
            os.kill(os.getpid(), sending.choice((signal.SIGINT, signal.SIGTERM)))
            time.sleep(sending.choice((0.0002, 0.001, 0.003)) * sending.random())

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    def come_to_rest():
        \"\"\"Wait for calls that go on behind interrupted callers, and for what they and others queued.\"\"\"
        end = time.monotonic() + 60
        while uninterrupted.running:
            assert time.monotonic() < end, "a call never ends"
            time.sleep(0.01)
        assert cache.flush(60)

    def conclude():
        \"\"\"After the last signal, and when no other process works any more.\"\"\"
        come_to_rest()
        cache.gc()
        found = cache.verify()
        assert found == [], found
        try:
            cache.check_integrity()
        except Exception as error:
            raise AssertionError(f"{{error}}; counters: {{cache.counters()}}") from None
        gc.collect()
        counters, rows = cache.counters(), cache.rows()
        assert all(row.pins == 0 for row in rows)
        assert counters["faults"] == counters["disk_errors"] == counters["corrupt_files"] == 0, counters
        for tier in cache.tiers():
            assert tier.error is None and tier.n_bytes <= tier.budget, tier
        assert list(root.glob("index.db.damaged-*")) == []
        assert list((root / "partial").iterdir()) == []
        with sqlite3.connect(root / "index.db", timeout=5, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        other.close()
        come_to_rest()
"""

CACHE = """
    def load(tokens):
        with cache.lookup(NAMESPACE, tokens) as match:
            for batch in cache.load_batches(match.blocks):
                for loaded in batch:
                    assert loaded.payload == payload_of(loaded.block).data, "the payload of another block"

    def save_again(tokens):
        block = cache.stored(dice.choice(blocks_of(tokens)).key)
        if block is not None:
            cache.save(block, payload_of(block), replace=True)

    def text(tokens):
        cache.remember_text(NAMESPACE, tokens.tobytes(), tokens)
        assert cache.longest_text(NAMESPACE, tokens.tobytes()) is not None

    def one_call():
        tokens = context(dice, 4)
        return dice.choices(
            (
                lambda: save(cache, tokens),
                lambda: load(tokens),
                lambda: save_again(tokens),
                lambda: text(tokens),
                lambda: cache.evict_bytes(dice.randrange(100_000), tiers=("disk",)),
                lambda: cache.evict_bytes(dice.randrange(30_000)),
                lambda: (cache.counters(), cache.tiers(), cache.rows()),
                lambda: (cache.contains(dice.randbytes(32)), cache.context(blocks_of(tokens)[-1].key)),
                lambda: (cache.remember_fingerprint("a", "b" * 64), cache.fingerprint("a")),
                lambda: cache.gc(),
                lambda: cache.verify(),
                lambda: cache.check_integrity(),
                lambda: cache.flush(1.0),
                lambda: cache.share_with_process(ram_file=root.with_name("memory")),
                lambda: cache.close(),
            ),
            (20, 20, 4, 4, 3, 3, 8, 4, 2, 2, 1, 1, 2, 1, 0.2),
        )[0]

    threading.Thread(target=send, daemon=True).start()
    while sum(caught.values()) < n_signals:
        while cache is None or cache.closed:
            cache = attempt(made)
        attempt(one_call())
    while cache is None or cache.closed:
        cache = made()
    come_to_rest()
    print("done", flush=True)
    sys.stdin.readline()
    conclude()
    cache.close()
    with made() as cache:
        conclude()
    print(*caught.values(), flush=True)
"""

MODEL = """
    import erllama
    from erllama.engine.backends.stub import StubBackend

    def stream(prompt, n):
        with model.stream(prompt, max_tokens=20) as events:
            for _, event in zip(range(n), events):
                pass

    def one_call():
        prompt = [dice.randrange(3, 9) for _ in range(dice.choice((5, 40, 90)))]
        return dice.choice(
            (
                lambda: model.complete(prompt, max_tokens=dice.randrange(20)),
                lambda: stream(prompt, dice.randrange(20)),
                lambda: model.prefill(prompt),
                lambda: model.cached_prefix(prompt),
                lambda: model.score(prompt, [5, 6]),
                lambda: model.evict(),
                lambda: (model.metrics, model.phase, model.pending, model.info, model.last_cache_hit),
                lambda: (erllama.list_models(), erllama.get_model("soak")),
                lambda: cache.evict_bytes(dice.randrange(100_000), tiers=("disk",)),
                lambda: cache.gc(),
            )
        )

    def loaded():
        return erllama.load_backend(StubBackend(n_sequences=4, n_ctx=1024), id="soak", cache=cache)

    cache = made()
    model = loaded()
    threading.Thread(target=send, daemon=True).start()
    while sum(caught.values()) < n_signals:
        if cache.closed:
            model.unload()
            cache = made()
            model = loaded()
        attempt(one_call())
    if cache.closed:
        model.unload()
        cache = made()
        model = loaded()
    come_to_rest()
    print("done", flush=True)
    sys.stdin.readline()
    reply = model.complete([5] * 40, max_tokens=10, temperature=0).tokens
    model.unload()
    conclude()
    cache.close()
    with erllama.Cache(ram=0) as cold, erllama.load_backend(StubBackend(), cache=cold) as other:
        assert other.complete([5] * 40, max_tokens=10, temperature=0).tokens == reply
    print(*caught.values(), flush=True)
"""


def soak(root: Path, work: str, n_processes: int) -> None:
    each = -(-SIGNALS // n_processes)
    children = [start_python(INTERRUPTED + work, root, each, seed) for seed in range(n_processes)]
    with killed_at_end(*children):
        for child in children:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line == "done\n", line + child.communicate(timeout=60)[1]
        for child in children:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            line = child.stdout.readline()
            assert line, child.communicate(timeout=60)[1]
            assert sum(map(int, line.split())) >= each
    assert bytes_in(root) <= QUOTA
    with Cache(block_size=SIZE, ram=0, disk=root, disk_quota=QUOTA) as cache:
        assert cache.verify() == []
        cache.check_integrity()
        assert cache.counters()["bytes_disk"] == bytes_in(root)


@pytest.mark.parametrize("n_processes", [1, 3])
def test_signals_at_random_moments_leave_a_directory_consistent(tmp_path: Path, n_processes: int) -> None:
    soak(tmp_path / "kv", CACHE, n_processes)


@pytest.mark.parametrize("n_processes", [1, 3])
def test_signals_during_model_calls_leave_the_cache_consistent(tmp_path: Path, n_processes: int) -> None:
    soak(tmp_path / "kv", MODEL, n_processes)


def test_an_interrupted_call_completes_in_the_background() -> None:
    began, go_on, steps = threading.Event(), threading.Event(), []

    @uninterrupted
    def change() -> None:
        steps.append("begun")
        began.set()
        go_on.wait()
        steps.append("ended")

    def interrupt() -> None:
        began.wait()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        sender = threading.Thread(target=interrupt)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            change()
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert steps == ["begun"]
    go_on.set()
    wait_until(lambda: not running_calls)
    assert steps == ["begun", "ended"]


def test_what_a_call_returns_or_raises_reaches_its_caller() -> None:
    @uninterrupted
    def divide(a: int, b: int) -> float:
        return a / b

    assert divide(6, b=3) == 2
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)


def test_a_call_runs_in_the_callers_thread_if_no_other_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    assert uninterrupted(threading.get_ident)() == threading.get_ident()


def test_a_signal_handler_can_call_the_cache_during_a_call(tmp_path: Path) -> None:
    found = []

    def handler(*_: object) -> None:
        found.append((cache.counters(), cache.tiers(), cache.flush(1.0)))
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # after this one has ended, or they pile up on a slow machine

    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, np.arange(64, dtype=np.int32))
        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        try:
            while len(found) < 20:
                cache.counters(), cache.rows(), cache.flush()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        cache.check_integrity()
