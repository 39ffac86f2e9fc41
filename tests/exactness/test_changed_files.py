"""A model file that changes while it is loaded never leads to wrong KV."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import erllama
from erllama.engine.backends.file_identity import MappedFiles, file_identity, identity
from erllama.engine.backends.stub import StubBackend
from erllama.testing.models import TINY, write_llama

PROMPT = [5 + i % 50 for i in range(100)]


@pytest.fixture
def other_gguf(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "other.gguf", TINY, seed=2)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[erllama.Cache]:
    with erllama.Cache(disk=tmp_path / "kv", block_size=32) as cache:
        yield cache


def overwrite(path: Path, other: Path) -> None:
    """Overwrite a file with the bytes of another, and keep its inode, size and mtime."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)


def opened(path: Path, cache: erllama.Cache, **options: object) -> erllama.Model:
    given: dict[str, object] = {"n_ctx": 512, "n_threads": 1, "warmup": False, **options}
    return erllama.load_model(path, cache=cache, **given)  # type: ignore[arg-type]


def greedy(model: erllama.Model, **options: object) -> erllama.Completion:
    return model.complete(PROMPT, max_tokens=8, temperature=0.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("naming", ["safe", "gguf_chunked"])
def test_kv_of_an_overwritten_file_is_not_stored_under_the_old_name(
    tiny_gguf: Path, other_gguf: Path, tmp_path: Path, cache: erllama.Cache, naming: str
) -> None:
    path = Path(shutil.copy(tiny_gguf, tmp_path / "model.gguf"))
    with erllama.Cache(ram=0) as nothing, opened(path, nothing) as model:
        right = greedy(model).tokens
    with opened(path, cache, fingerprint=naming) as model:
        overwrite(path, other_gguf)
        assert greedy(model).tokens != right  # the mapped weights changed, so this KV must not be kept
        model.evict()
    assert not [row for row in cache.rows() if row.tier != "live"]
    path.write_bytes(tiny_gguf.read_bytes())
    with opened(path, cache, fingerprint=naming) as model:
        reply = greedy(model)
    assert (reply.cache.kind, reply.tokens) == ("cold", right)


@pytest.mark.skipif(os.environ.get("ERLLAMA_TEST_RPC") == "1", reason="a server has a copy of the weights")
def test_old_kv_is_not_used_with_changed_weights(
    tiny_gguf: Path, other_gguf: Path, tmp_path: Path, cache: erllama.Cache, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copy(tiny_gguf, tmp_path / "model.gguf"))
    with opened(other_gguf, cache) as model:
        cold = greedy(model).tokens
    caplog.set_level(logging.WARNING, "erllama")
    with opened(path, cache) as model:
        first = greedy(model)
        assert greedy(model, session_id="s").cache.kind == "exact"
        assert model.info.cache_problem == ""
        assert model.cached_prefix(PROMPT) > 0
        overwrite(path, other_gguf)
        assert model.cached_prefix(PROMPT) == 0
        # Everything is computed with the new weights, including parked cells and sessions.
        for options in ({}, {"session_id": "s"}, {"parent_key": first.finish_key}, {"reproducible": True}):
            reply = greedy(model, **options)
            assert (reply.cache.kind, reply.tokens, reply.finish_key) == ("cold", cold, None)
        assert "was changed, replaced or removed" in model.info.cache_problem
        assert str(path) in model.info.cache_problem
    warnings = [record.message for record in caplog.records if "without the cache" in record.message]
    assert len(warnings) == 1
    assert str(path) in warnings[0]


def test_concurrent_requests_on_changed_weights_all_end(
    tiny_gguf: Path, other_gguf: Path, tmp_path: Path, cache: erllama.Cache
) -> None:
    path = Path(shutil.copy(tiny_gguf, tmp_path / "model.gguf"))
    with opened(path, cache) as model:
        overwrite(path, other_gguf)
        streams = [model.stream(PROMPT, max_tokens=4, temperature=0.0) for _ in range(6)]
        assert [stream.result().cache.kind for stream in streams] == ["cold"] * 6


def test_a_file_loaded_without_mmap_may_be_overwritten(
    tiny_gguf: Path, other_gguf: Path, tmp_path: Path, cache: erllama.Cache
) -> None:
    path = Path(shutil.copy(tiny_gguf, tmp_path / "model.gguf"))
    with opened(path, cache, mmap=False) as model:
        right = greedy(model).tokens
        overwrite(path, other_gguf)
        model.evict()
        reply = greedy(model)
        assert (reply.cache.kind, reply.tokens, model.info.cache_problem) == ("exact", right, "")


def test_the_file_of_a_loaded_adapter_may_be_overwritten(
    tiny_gguf: Path, loras: list[Path], tmp_path: Path, cache: erllama.Cache
) -> None:
    path = Path(shutil.copy(loras[0], tmp_path / "adapter.gguf"))
    with erllama.Cache(ram=0) as nothing, opened(tiny_gguf, nothing) as model:
        model.load_adapter(path)
        right = greedy(model).tokens
    with opened(tiny_gguf, cache) as model:
        model.load_adapter(path)
        path.write_bytes(bytes(path.stat().st_size))
        assert greedy(model).tokens == right
        model.evict()
        reply = greedy(model)
        assert (reply.cache.kind, reply.tokens) == ("exact", right)


def changes() -> list[tuple[str, Callable[[Path, Path], object]]]:
    return [
        ("appended to", lambda path, other: path.write_bytes(path.read_bytes() + b"x")),
        ("overwritten", overwrite),
        ("replaced", lambda path, other: os.replace(other, path)),
        ("removed", lambda path, other: path.unlink()),
    ]


@pytest.mark.parametrize(("how", "change"), changes())
@pytest.mark.parametrize("part", [1, 3])
def test_every_part_of_a_split_model_is_watched(
    tiny_gguf: Path, other_gguf: Path, tmp_path: Path, how: str, change: Callable[[Path, Path], object], part: int
) -> None:
    paths = [tmp_path / f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in paths:
        shutil.copy(tiny_gguf, path)
    files = MappedFiles(paths[0], identity(paths[0]))
    assert files.problem() == ""
    change(paths[part - 1], other_gguf)
    assert paths[part - 1].name in files.problem()
    shutil.copy(tiny_gguf, paths[part - 1])
    assert files.problem()  # KV computed in the meantime may still be in the context


def test_a_file_without_stat_is_a_problem_until_it_is_readable(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(tiny_gguf, tmp_path / "model.gguf"))
    files = MappedFiles(path, identity(path))

    def failing(self: Path, **_: object) -> os.stat_result:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", failing)
        assert "cannot be examined" in files.problem()
    assert files.problem() == ""


def test_a_custom_backend_can_report_changed_weights() -> None:
    class Changing(StubBackend):
        problem = ""
        fails = False

        def weights_problem(self) -> str:
            if self.fails:
                raise OSError("injected")
            return self.problem

    backend = Changing(eog_bias=-100)
    with erllama.Cache(block_size=32) as cache, erllama.load_backend(backend, cache=cache) as model:
        assert [greedy(model).cache.kind for _ in range(2)] == ["cold", "exact"]
        backend.problem = "somebody wrote to it"
        assert (greedy(model).cache.kind, model.info.cache_problem) == ("cold", "somebody wrote to it")
        backend.problem, backend.fails = "", True
        assert greedy(model).cache.kind == "cold"
        assert "OSError: injected" in model.info.cache_problem
        n_rows = len(cache.rows())
        model.complete([7] * 200, max_tokens=1)
        assert len(cache.rows()) <= n_rows
        backend.fails = False
        assert greedy(model).cache.kind == "exact"


def test_two_changes_within_one_file_system_tick_are_detected(tmp_path: Path) -> None:
    """A file system may record both with one time, so the identity is taken only after that time has passed."""
    path = tmp_path / "model.gguf"
    for i in range(20):
        path.write_bytes(b"a%d" % i)
        before = file_identity(path)
        path.write_bytes(b"b%d" % i)
        assert file_identity(path) != before
