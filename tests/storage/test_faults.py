"""Single faults around the cache and the models, and what each must not cause."""

from __future__ import annotations

import fcntl
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Block, Cache
from erllama.cache.tiers.sqlite_index import Index
from erllama.engine import Batch
from erllama.engine.backends.stub import StubBackend
from erllama.llama_ffi import LlamaContext, LlamaError, LlamaModel
from support.paths import TESTS
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, hit, payload_of, save
from support.subprocesses import must_run


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, np.arange(40, dtype=np.int32))
    found = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
    yield found
    found.close()


# --- the index lies ------------------------------------------------------------------------------


def test_wrong_tokens_in_the_index_are_never_served(tmp_path: Path, connection: sqlite3.Connection) -> None:
    """Flip one bit in a row, and use a prompt with the tokens that the row then has."""
    key, tokens = connection.execute("SELECT key, tokens FROM blocks WHERE start = 32").fetchone()
    forged = bytes([tokens[0] ^ 1]) + tokens[1:]
    connection.execute("UPDATE blocks SET tokens = ? WHERE key = ?", (forged, key))
    connection.close()
    asked = np.concatenate([np.arange(32, dtype=np.int32), np.frombuffer(forged, "<u4").astype(np.int32)])
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        assert hit(cache, asked) == 32, "the rows are inconsistent, so the index was rebuilt from the files"
        assert hit(cache, np.arange(40, dtype=np.int32)) == 40


def test_tokens_are_checked_against_the_file_on_load(tmp_path: Path) -> None:
    tokens = np.arange(8, dtype=np.int32)
    (block,) = blocks_of(tokens)
    other = Block(block.key, block.parent, block.namespace, 0, blocks_of(tokens + 1)[0].tokens, block.reason)
    with Cache(block_size=SIZE, disk=tmp_path, ram=0) as cache:
        cache.save(block, payload_of(block))
        cache.flush()
        assert cache.load(other) is None
        assert cache.counters()["corrupt_files"] == 1


@pytest.mark.parametrize(
    "change", ["reason = 77", "reason = NULL", "start = -1", "parent = x'00'", "recipe = NULL, slice_end = NULL"]
)
def test_an_invalid_index_row_is_rebuilt_from_its_file(
    tmp_path: Path, connection: sqlite3.Connection, change: str
) -> None:
    connection.execute(f"UPDATE blocks SET {change}")
    connection.close()
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        assert cache.disk_error is None
        assert hit(cache, np.arange(40, dtype=np.int32)) == 40


def test_a_damaged_index_is_rebuilt(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        for i in range(20):
            save(cache, np.arange(100 * i, 100 * i + 40, dtype=np.int32))
    path = tmp_path / "index.db"
    sound = path.read_bytes()
    dice = random.Random(1)
    for _ in range(60):
        content = bytearray(sound)
        for _ in range(dice.randrange(1, 20)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        for stale in tmp_path.glob("index.db*"):
            stale.unlink()
        path.write_bytes(content)
        with Cache(block_size=SIZE, disk=tmp_path) as cache:
            assert (
                cache.disk_error is None or "newer" in str(cache.disk_error) or "version" in str(cache.disk_error)
            )
            if cache.disk_error is None:
                assert hit(cache, np.arange(40, dtype=np.int32)) == 40


# --- writing goes wrong ------------------------------------------------------------------------------


def test_a_writer_thread_that_cannot_start_drops_only_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "erllama-cache-writer":
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(self)

    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        save(cache, np.arange(SIZE, dtype=np.int32))
        assert cache.flush(120)
        assert cache.counters()["bytes_pending"] == 0
        monkeypatch.undo()
        save(cache, np.arange(100, 100 + SIZE, dtype=np.int32))
        assert cache.flush(120)
        assert cache.counters()["blocks_disk"] == 1


def test_a_file_that_cannot_be_indexed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        monkeypatch.setattr(Index, "put", locked)
        save(cache, np.arange(SIZE, dtype=np.int32))
        cache.flush()
        assert list(tmp_path.rglob("*.kvc")) == []
        assert cache.counters()["disk_errors"] == 1
        monkeypatch.undo()
        save(cache, np.arange(100, 100 + SIZE, dtype=np.int32))
        cache.flush()
        assert cache.counters()["blocks_disk"] == 1


def test_a_smaller_quota_holds_from_the_start(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, np.arange(160, dtype=np.int32), n_bytes=3200)
    with Cache(block_size=SIZE, disk=tmp_path, disk_quota=10_000) as cache:
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.kvc")) <= 10_000
        assert 0 < hit(cache, np.arange(160, dtype=np.int32)) < 160


def test_processes_share_one_quota(tmp_path: Path) -> None:
    program = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import numpy as np
        from support.storage.blocks import save
        from erllama.cache import Cache
        from support.storage.blocks import SIZE
        with Cache(block_size=SIZE, disk=sys.argv[1], disk_quota=50_000) as cache:
            for i in range(10):
                save(cache, np.arange(1000 * i, 1000 * i + SIZE, dtype=np.int32) + int(sys.argv[3]), n_bytes=3200)
            cache.flush()
    """
    with Cache(block_size=SIZE, disk=tmp_path, disk_quota=50_000) as cache:
        for i in range(3):
            save(cache, np.arange(100 * i, 100 * i + SIZE, dtype=np.int32) + 10**6, n_bytes=3200)
            cache.flush()
            must_run(program, tmp_path, TESTS, 20_000 * i)
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.kvc")) <= 50_000


def test_two_caches_of_one_process_can_share_a_directory(tmp_path: Path) -> None:
    tokens = np.arange(64, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path) as first, Cache(block_size=SIZE, disk=tmp_path) as second:
        save(first, tokens)
        save(second, tokens)
        first.flush()
        second.flush()
        assert first.counters()["disk_errors"] == second.counters()["disk_errors"] == 0
        assert first.counters()["blocks_disk"] == second.counters()["blocks_disk"] == 4


def test_processes_that_start_together_all_use_the_disk(tmp_path: Path) -> None:
    program = "import sys, erllama; print(erllama.Cache(disk=sys.argv[1]).disk_error)"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "kv")], cwd="/", stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in started] == ["None"] * 6


def test_a_lock_file_removed_by_mistake_is_recreated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robbed: list[Path] = []
    lock = fcntl.flock

    def reaper(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if not robbed:  # another starting process removes it between its creation and its locking
            (path,) = (tmp_path / "kv" / "owners").iterdir()
            path.unlink()
            robbed.append(path)

    monkeypatch.setattr(fcntl, "flock", reaper)
    with Cache(disk=tmp_path / "kv") as cache:
        assert robbed
        assert cache.disk_error is None
        assert len(list((tmp_path / "kv" / "owners").iterdir())) == 1


def test_opening_a_shared_directory_does_not_lock_others_out(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    (shared / "theirs.txt").touch()
    with Cache(disk=shared) as cache:
        assert "chmod 700" in str(cache.disk_error)
    assert shared.stat().st_mode & 0o777 == 0o755
    own = tmp_path / "own"  # as after a build and a demo
    for name in ("llama", "models"):
        (own / name).mkdir(parents=True)
    own.chmod(0o755)
    with Cache(disk=own) as cache:
        assert cache.disk_error is None
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o755)
    with Cache(disk=empty) as cache:
        assert cache.disk_error is None
    assert empty.stat().st_mode & 0o777 == 0o700


def test_a_block_replaced_by_another_process_is_served_in_its_new_version(tmp_path: Path) -> None:
    (block,) = blocks_of(np.arange(SIZE, dtype=np.int32))
    better = Block(block.key, block.parent, NAMESPACE, 0, block.tokens, block.reason, b"r" * 16, SIZE)
    with (
        Cache(block_size=SIZE, disk=tmp_path, ram=0) as mine,
        Cache(block_size=SIZE, disk=tmp_path, ram=0) as theirs,
    ):
        mine.save(block, payload_of(block))
        mine.flush()
        assert hit(theirs, np.arange(SIZE, dtype=np.int32)) == SIZE
        theirs.save(better, payload_of(block), replace=True)
        theirs.flush()
        loaded = mine.load(block)
        assert loaded is not None
        assert loaded.block == better
        assert mine.stored(block.key) == better


def test_blocks_recomputed_by_one_process_serve_another(tmp_path: Path) -> None:
    """A still finds a prompt whose blocks B has replaced by blocks of other slices."""
    prompt = np.random.default_rng(1).integers(0, 256, 301)
    ask = {"max_tokens": 3, "temperature": 0.0}
    with Cache(ram=0, disk=tmp_path, block_size=32) as a, Cache(ram=0, disk=tmp_path, block_size=32) as b:
        with (
            erllama.load_backend(StubBackend(n_ubatch=64), cache=a) as one,
            erllama.load_backend(StubBackend(n_ubatch=64), cache=b) as two,
        ):
            one.complete(prompt[:40], **ask)  # type: ignore[arg-type]
            one.complete(prompt, **ask)  # type: ignore[arg-type]
            a.flush()
            expected = two.complete(prompt, reproducible=True, **ask)  # type: ignore[arg-type]
            b.flush()
            a.rows()  # checks at once for saves of other processes
            for reproducible in (False, True):
                reply = one.complete(prompt, reproducible=reproducible, **ask)  # type: ignore[arg-type]
                assert reply.tokens == expected.tokens
                assert reply.cache.kind == "exact"


# --- models come and go --------------------------------------------------------------------------------


def test_unloading_twice_does_not_unload_the_next_model_of_that_id() -> None:
    with erllama.load_backend(StubBackend(), id="chat") as first:
        first.unload()
        with erllama.load_backend(StubBackend(), id="chat") as second:
            first.unload()
            assert erllama.get_model("chat") is second


def test_a_backend_raising_system_exit_fails_only_its_request() -> None:
    class Exiting(StubBackend):
        exits = True

        def decode(self, batch: Batch) -> NDArray[np.float32]:
            if self.exits:
                raise SystemExit("a backend must not")
            return super().decode(batch)

    backend = Exiting(eog_bias=-100)
    with erllama.load_backend(backend) as model:
        with pytest.raises(erllama.BackendError, match="SystemExit: a backend must not"):
            model.complete("x")
        backend.exits = False
        assert len(model.complete("x", max_tokens=3).tokens) == 3


def test_a_forked_child_gets_an_error_and_exits_normally(tiny_gguf: Path, tmp_path: Path) -> None:
    must_run(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import erllama
        cache = erllama.Cache(disk=sys.argv[2])
        model = erllama.load_model(sys.argv[1], cache=cache, n_ctx=256, n_threads=1)
        model.complete("hello", max_tokens=4)
        stream = model.stream("hello", max_tokens=4)
        pid = os.fork()
        if pid == 0:
            try:
                model.complete("hello")
            except erllama.ModelUnloaded as error:
                assert "spawn" in str(error)
            else:
                os._exit(1)
            for ask in (lambda: stream.result(), lambda: next(stream), lambda: stream._ticket.poll()):
                try:
                    ask()
                except erllama.ModelUnloaded as error:
                    assert "fork" in str(error)
                else:
                    os._exit(1)
            assert erllama.list_models() == []
            assert cache.closed and cache.rows() == []
            from erllama.engine.backends.stub import StubBackend
            with erllama.load_backend(StubBackend()) as other:
                other.complete("a model of its own works", max_tokens=3)
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert model.complete("hello", max_tokens=4).cache.kind == "exact"
        """,
        tiny_gguf,
        tmp_path,
        timeout=60,
    )


def test_the_interpreter_exits_quietly_during_a_prompt(tiny_gguf: Path) -> None:
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, time, erllama\n"
            "model = erllama.load_model(sys.argv[1], n_ctx=16384, n_threads=1)\n"
            "stream = model.stream([5] * 16000)\n"
            "time.sleep(0.2)\n",
            str(tiny_gguf),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_changed_content_under_the_same_name_and_time_is_another_model(tmp_path: Path) -> None:
    from erllama.testing.models import TINY, write_llama

    path = write_llama(tmp_path / "model.gguf", TINY, seed=1)
    status = path.stat()
    prompt, ask = [5 + i % 50 for i in range(100)], {"max_tokens": 8, "temperature": 0.0}
    with Cache() as cache:
        with erllama.load_model(path, cache=cache, n_ctx=512, n_threads=1) as model:
            model.complete(prompt, **ask)  # type: ignore[arg-type]
        path.write_bytes(write_llama(tmp_path / "other.gguf", TINY, seed=2).read_bytes())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        with erllama.load_model(path, cache=cache, n_ctx=512, n_threads=1) as model:
            assert model.complete(prompt, **ask).cache.kind == "cold"  # type: ignore[arg-type]


def test_a_refused_decode_does_not_reserve_logits(tiny_gguf: Path) -> None:
    n = 64
    ones, zeros = np.ones(n, np.int8), np.zeros(n, np.int32)
    with LlamaModel(tiny_gguf) as model, LlamaContext(model, n_ctx=256, n_threads=1) as context:
        context.decode(zeros[:1] + 5, zeros[:1], zeros[:1], ones[:1])
        with pytest.raises(LlamaError):  # positions that do not follow
            context.decode(zeros + 5, np.arange(100, 100 + n, dtype=np.int32), zeros, ones)
        context.clear()
        context.decode(zeros[:1] + 5, zeros[:1], zeros[:1], ones[:1])
        view = context.logits()
        kept = view.copy()
        context.clear()
        with pytest.raises(LlamaError, match="views"):
            context.decode(zeros + 5, np.arange(n, dtype=np.int32), zeros, ones)
        assert (view == kept).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.complete([[1], [2, 3]]),
        lambda model: model.complete("x", temperature=10**400),
        lambda model: model.complete([10**30]),
        lambda model: erllama.Cache(disk="a\0b"),
        lambda model: erllama.Cache(disk="~nosuchuser/x"),
        lambda model: erllama.Cache(ram="9" * 400 + "GB"),
        lambda model: erllama.load_model("~nosuchuser/m.gguf"),
        lambda model: erllama.load_model("m.gguf", n_gpu_layers=2**40),
        lambda model: erllama.get_model(["chat"]),
        lambda model: erllama.load_backend(None),
        lambda model: erllama.load_model("m.gguf", n_threads=np.array([1, 2])),
        lambda model: erllama.load_model("m.gguf", flash_attn="on"),
        lambda model: model.complete("x", temperature=np.array([0.5])),
        lambda model: model.prefill("x", max_tokens=5),
        lambda model: model.tokenize("x", add_bos=True),
        lambda model: model.detokenize([[1], [2, 3]]),
    ],
)
def test_mistakes_raise_errors_of_this_library(tiny: erllama.Model, use: object) -> None:
    with pytest.raises(erllama.Error):
        use(tiny)  # type: ignore[operator]


def test_a_pipe_as_model_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(erllama.ModelLoadError, match="not a regular file"):
        erllama.load_model(tmp_path / "pipe.gguf")
