"""A model in its own process does what one in this process does, with the same results."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import erllama
from erllama.testing.bert import write_bert
from support.model_processes import model_processes
from support.threads import wait_until

OPTIONS = {"n_ctx": 1024, "n_threads": 1, "n_batch": 256, "n_ubatch": 64}
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[erllama.Cache]:
    with erllama.Cache(ram=None, ram_file=tmp_path / "blocks", block_size=16) as cache:
        yield cache


@pytest.fixture
def remote(tiny_gguf: Path, cache: erllama.Cache) -> Iterator[erllama.Model]:
    with erllama.load_model(tiny_gguf, cache=cache, process=True, **OPTIONS) as model:  # type: ignore[arg-type]
        yield model


# --- the same as in this process -----------------------------------------------------------------


def test_completions_equal_those_of_a_model_in_this_process(tiny: erllama.Model, remote: erllama.Model) -> None:
    requests: list[dict[str, object]] = [
        {"max_tokens": 20, "temperature": 0},
        {"max_tokens": 20, "seed": 5},
        {"max_tokens": 20, "seed": 5, "logprobs": 2, "stop": ["e"]},
        {"max_tokens": 12, "seed": 5, "regex": "[a-z]{3,9}"},
        {"max_tokens": 12, "seed": 5, "mirostat": 1},
    ]
    for options in requests:
        here = tiny.complete("Once upon a time", reproducible=True, **options)  # type: ignore[arg-type]
        there = remote.complete("Once upon a time", reproducible=True, **options)  # type: ignore[arg-type]
        assert (there.text, there.tokens, there.finish_reason) == (here.text, here.tokens, here.finish_reason)
        assert there.context_tokens == here.context_tokens
        assert there.sampling_state == here.sampling_state or "seed" not in options
        assert there.stop_sequence == here.stop_sequence
        assert there.restarts == 0
        if here.logprobs is not None and there.logprobs is not None:
            for a, b in zip(here.logprobs, there.logprobs, strict=True):
                assert (a.token, [token for token, _ in a.top]) == (b.token, [token for token, _ in b.top])
                assert a.logprob == pytest.approx(b.logprob)


def test_streams_chats_scores_and_infilling_work(tiny: erllama.Model, remote: erllama.Model) -> None:
    with remote.stream("Once", max_tokens=8, temperature=0) as stream:
        events = list(stream)
    assert isinstance(events[-1], erllama.Done)
    text = "".join(event.text for event in events if isinstance(event, erllama.TextDelta))
    assert text == events[-1].completion.text == tiny.complete("Once", max_tokens=8, temperature=0).text
    assert remote.chat(MESSAGES, max_tokens=5, temperature=0).tokens
    assert remote.apply_chat_template(MESSAGES).tolist() == tiny.apply_chat_template(MESSAGES).tolist()
    here, there = tiny.score("Once upon", " a time"), remote.score("Once upon", " a time")
    assert there.logprob == pytest.approx(here.logprob)
    assert remote.draft("Once", 4) == tiny.draft("Once", 4)
    proposed = tiny.draft("Once", 4)
    assert remote.verify("Once", proposed) == tiny.verify("Once", proposed)
    with pytest.raises(erllama.Unsupported):
        remote.infill("a", "b")


def test_embeddings_equal_those_of_a_model_in_this_process(tiny: erllama.Model, remote: erllama.Model) -> None:
    texts = ["one", "two words", "three more words"]
    np.testing.assert_allclose(remote.embed(texts), tiny.embed(texts), rtol=1e-5, atol=1e-6)
    for a, b in zip(remote.embed(texts, pooling="none"), tiny.embed(texts, pooling="none"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(erllama.Unsupported):
        remote.rerank("one", ["two"])


def test_an_encoder_and_a_reranker_run_in_a_process(tmp_path: Path, cache: erllama.Cache) -> None:
    path = write_bert(tmp_path / "bert.gguf")
    with (
        erllama.load_model(path, cache=cache, n_threads=1) as here,
        erllama.load_model(path, cache=cache, n_threads=1, process=True) as there,
    ):
        np.testing.assert_allclose(there.embed(["a b", "c"]), here.embed(["a b", "c"]), rtol=1e-5, atol=1e-6)
        with pytest.raises(erllama.Unsupported):
            there.complete("a")


def test_adapters_separate_replies_and_survive_a_crash(
    tiny: erllama.Model, remote: erllama.Model, loras: list[Path]
) -> None:
    prompt = "Once upon a time there was"
    plain = remote.complete(prompt, max_tokens=8, temperature=0, logprobs=0)
    adapter = remote.load_adapter(loras[0], scale=0.5)
    here = tiny.load_adapter(loras[0], scale=0.5)
    assert [found.path for found in remote.adapters] == [loras[0]]
    assert adapter.sha256 == here.sha256
    changed = remote.complete(prompt, max_tokens=8, temperature=0, logprobs=0)
    assert changed.logprobs != plain.logprobs
    assert changed.tokens == tiny.complete(prompt, max_tokens=8, temperature=0).tokens
    assert remote.cached_prefix(prompt) > 0
    os.kill(remote.info.pid, signal.SIGKILL)
    again = remote.complete(prompt, max_tokens=8, temperature=0, logprobs=0)
    assert again.tokens == changed.tokens
    adapter.scale = 0.0
    assert remote.complete(prompt, max_tokens=8, temperature=0).tokens == plain.tokens
    adapter.unload()
    assert not adapter.loaded
    assert remote.adapters == ()
    with pytest.raises(erllama.AdapterLoadError):
        remote.load_adapter("/no/such/file.gguf")


def test_sessions_parents_and_the_cache_work(remote: erllama.Model, cache: erllama.Cache) -> None:
    prompt = "Once upon a time there was a small house in a large wood, and nobody lived there"
    cold = remote.complete(prompt, max_tokens=20, temperature=0, session_id="s")
    assert cold.cache.kind == "cold"
    assert remote.last_cache_hit == cold.cache
    assert remote.end_session("s")
    assert not remote.end_session("s")
    remote.evict()
    assert remote.cached_prefix(prompt) >= 16
    warm = remote.complete(prompt, regex="[a-z ]{20}", seed=1)
    assert warm.cache.kind == "exact"
    follow = remote.complete(prompt + warm.text, max_tokens=4, temperature=0, parent_key=warm.finish_key)
    assert follow.context_tokens[: len(warm.context_tokens)] == warm.context_tokens
    assert cache.flush()  # no block is written between the two reports
    counters = cache.counters()
    assert counters["misses"] == 1
    assert counters["hits_exact"] + counters["hits_resume"] + counters["hits_longest_prefix"] == 2
    stored = [row for row in cache.rows() if row.tier == "ram_file"]
    assert len({row.key for row in stored}) == len(stored) == counters["blocks_ram_file"]
    assert {status.tier for status in cache.tiers()} == {"live", "ram_file"}


def test_state_and_information_are_reported(tiny_gguf: Path, remote: erllama.Model) -> None:
    assert (remote.phase, remote.pending, remote.queue_depth, remote.restarts) == ("idle", 0, 0, 0)
    with erllama.load_model(tiny_gguf, **OPTIONS) as here:  # type: ignore[arg-type]
        ours, theirs = here.info, remote.info
        for name in ("architecture", "n_params", "n_ctx", "n_vocab", "n_seq_max", "n_threads", "description"):
            assert getattr(theirs, name) == getattr(ours, name), name
        assert dict(remote.metadata).keys() == dict(here.metadata).keys()
        assert ours.pid == os.getpid() != theirs.pid
        assert remote.tokenize("a text").tolist() == here.tokenize("a text").tolist()
    remote.complete("Once", max_tokens=3)
    remote.prefill("Twice upon")
    metrics = remote.metrics
    assert metrics.finished == {"length": 2}
    assert metrics.prompt_tokens > 0
    assert sum(metrics.first_token.counts) == 1
    assert erllama.get_model(remote.id) is remote


def test_asyncio_and_cancellation_work(remote: erllama.Model) -> None:
    async def run() -> None:
        reply = await remote.acomplete("Once", max_tokens=5, temperature=0)
        assert len(reply.tokens) == 5
        n_tokens = 0
        async with remote.astream("Once", max_tokens=900, temperature=1.5, seed=1) as stream:
            async for event in stream:
                n_tokens += len(getattr(event, "tokens", ()))
                if n_tokens > 5:
                    break
        assert (await stream.result()).finish_reason in ("cancelled", "stop")
        rows = await remote.aembed(["a", "b"])
        assert rows.shape[0] == 2
        with pytest.raises(erllama.DeadlineExceeded):
            await remote.acomplete("Once", timeout=0.0)

    asyncio.run(run())


def test_errors_of_the_process_are_raised_by_the_call(remote: erllama.Model) -> None:
    with pytest.raises(erllama.PromptTooLong):
        remote.complete([1] * 2000)
    with pytest.raises(erllama.OptionError, match="vocabulary"):
        remote.complete("a", logit_bias={10**6: 1.0})
    with pytest.raises(erllama.OptionError, match=r"samplers.*without process=True"):
        remote.complete("a", samplers=["top_k", lambda candidates: candidates])
    with pytest.raises(erllama.OptionError, match=r"speculative.*without process=True"):
        remote.stream("a", speculative=lambda tokens, n: [])
    stream = remote.stream("Once", max_tokens=900, seed=3, temperature=2.0, session_id="s")
    next(stream)
    with pytest.raises(erllama.SessionBusy):
        remote.complete("Twice", session_id="s")
    stream.cancel()
    assert stream.result().finish_reason in ("cancelled", "stop")
    assert remote.complete("Once", max_tokens=2).tokens


# --- loading, and what cannot be loaded ----------------------------------------------------------


def test_what_cannot_be_loaded_says_why(tmp_path: Path, cache: erllama.Cache, tiny_gguf: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny_gguf.read_bytes()[:4000])
    for path, message in ((tmp_path / "missing.gguf", "does not exist"), (bad, "bad.gguf")):
        with pytest.raises(erllama.ModelLoadError, match=message):
            erllama.load_model(path, cache=cache, process=True)
    with pytest.raises(erllama.OptionError, match="did you mean 'max_restarts'"):
        erllama.load_model(tiny_gguf, cache=cache, process={"max_restart": 1})
    with pytest.raises(erllama.OptionError, match="process"):
        erllama.load_model(tiny_gguf, cache=cache, process="yes")  # type: ignore[arg-type]
    with pytest.raises(erllama.OptionError, match="vocab_only"):
        erllama.load_model(tiny_gguf, cache=cache, process=True, vocab_only=True)
    assert not model_processes()


def test_a_process_that_dies_while_it_loads_is_not_started_again(cache: erllama.Cache) -> None:
    with pytest.raises(erllama.ModelLoadError, match=r"while it loaded the model.*SIGABRT"):
        erllama.load_backend("os:abort", cache=cache, process=True)
    assert not model_processes()


def test_progress_is_reported_and_can_cancel(tiny_gguf: Path, cache: erllama.Cache) -> None:
    seen: list[float] = []
    with erllama.load_model(tiny_gguf, cache=cache, process=True, on_progress=seen.append, **OPTIONS):  # type: ignore[arg-type]
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
    with pytest.raises(erllama.LoadCancelled):
        erllama.load_model(tiny_gguf, cache=cache, process=True, on_progress=lambda _: False)
    assert not model_processes()


# --- ends ------------------------------------------------------------------------------------------


def test_unloading_ends_the_process_and_its_requests(tiny_gguf: Path, cache: erllama.Cache) -> None:
    model = erllama.load_model(tiny_gguf, cache=cache, process=True, **OPTIONS)  # type: ignore[arg-type]
    stream = model.stream("Once", max_tokens=900, seed=1, temperature=2.0, stop_token_ids=[])
    next(stream)
    model.unload()
    model.unload()
    with pytest.raises(erllama.ModelUnloaded):
        stream.result()
    with pytest.raises(erllama.ModelUnloaded):
        model.complete("a")
    assert not model_processes()


def in_program(code: str, *arguments: object) -> subprocess.Popen[str]:
    prelude = "import sys, os, time, signal, erllama\npath, blocks = sys.argv[1:3]\n"
    prelude += "def load():\n    cache = erllama.Cache(ram=None, ram_file=blocks, block_size=16)\n"
    prelude += "    return erllama.load_model(path, cache=cache, n_ctx=512, n_threads=1, process=True)\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def test_a_killed_parent_takes_the_process_with_it(tiny_gguf: Path, tmp_path: Path) -> None:
    code = """
        model = load()
        prompt = "Once upon a time there was a house in a wood"
        reply = model.complete(prompt, max_tokens=4, temperature=0)
        model.cache.flush()
        print(model.info.pid, reply.cache.kind, flush=True)
        time.sleep(600)
    """
    for kind in ("cold", "exact"):
        program = in_program(code, tiny_gguf, tmp_path)
        assert program.stdout is not None
        pid, found = program.stdout.readline().split()
        assert found == kind
        program.kill()
        program.communicate()
        wait_until(lambda pid=int(pid): not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_several_programs_share_one_directory(tiny_gguf: Path, tmp_path: Path) -> None:
    code = """
        model = load()
        prompts = [f"Once upon a time there were {n} houses in a large wood" for n in range(4)]
        for _ in range(3):
            replies = [model.complete(prompt, max_tokens=6, temperature=0, reproducible=True) for prompt in prompts]
        print([reply.tokens for reply in replies], flush=True)
        sys.stdin.readline()
        model.cache.flush()
        print(model.cache.counters()["corrupt_files"], len(model.cache.verify()))
        model.unload()
    """
    programs = [in_program(code, tiny_gguf, tmp_path) for _ in range(3)]
    replies = []
    for program in programs:
        assert program.stdout is not None
        replies.append(program.stdout.readline())
    for program in programs:
        printed, complaints = program.communicate("\n", timeout=120)
        assert printed.split() == ["0", "0"], complaints
    assert replies[0].startswith("[(")
    assert replies == [replies[0]] * 3


def test_a_program_that_ends_leaves_no_process(tiny_gguf: Path, tmp_path: Path) -> None:
    program = in_program("model = load(); print(model.info.pid, flush=True)", tiny_gguf, tmp_path)
    printed, complaints = program.communicate(timeout=120)
    assert program.returncode == 0, complaints
    assert not psutil.pid_exists(int(printed))


def test_a_fork_has_no_models_and_leaves_the_process_alone(tiny_gguf: Path, tmp_path: Path) -> None:
    code = """
        import warnings; warnings.simplefilter("ignore")
        model = load()
        child = os.fork()
        if not child:
            try:
                model.complete("a")
            except erllama.ModelUnloaded:
                os._exit(7)
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(model.complete("a", max_tokens=3).tokens))
        model.unload()
    """
    printed, complaints = in_program(code, tiny_gguf, tmp_path).communicate(timeout=120)
    assert printed.split() == ["7", "3"], complaints


def test_a_stopped_parent_finds_its_process_alive(tiny_gguf: Path, tmp_path: Path) -> None:
    code = """
        cache = erllama.Cache(ram=None, ram_file=blocks, block_size=16)
        model = erllama.load_model(path, cache=cache, n_ctx=512, n_threads=1, process={"hang_timeout": 3.0})
        print(model.info.pid, flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(2)
        print(model.restarts, len(model.complete("a", max_tokens=3).tokens), flush=True)
        model.unload()
    """
    program = in_program(code, tiny_gguf, tmp_path)
    assert program.stdout is not None
    program.stdout.readline()
    wait_until(lambda: psutil.Process(program.pid).status() == "stopped")
    time.sleep(5)  # longer than `hang_timeout`
    program.send_signal(signal.SIGCONT)
    printed, complaints = program.communicate(timeout=120)
    assert printed.split() == ["0", "3"], complaints


def test_a_stopped_process_is_replaced(tiny_gguf: Path, cache: erllama.Cache) -> None:
    with erllama.load_model(
        tiny_gguf,
        cache=cache,
        process={"hang_timeout": 1.0},
        **OPTIONS,  # type: ignore[arg-type]
    ) as model:
        os.kill(model.info.pid, signal.SIGSTOP)
        assert len(model.complete("Once", max_tokens=3, temperature=0).tokens) == 3
        assert model.restarts == 1


def test_ctrl_c_reaches_this_process_alone(tiny_gguf: Path, cache: erllama.Cache, remote: erllama.Model) -> None:
    child = psutil.Process(remote.info.pid)
    assert os.getpgid(child.pid) != os.getpgid(0)
    os.kill(child.pid, signal.SIGINT)
    assert len(remote.complete("Once", max_tokens=3).tokens) == 3
    assert remote.restarts == 0


def test_a_reader_that_stops_does_not_stall_other_streams(remote: erllama.Model) -> None:
    slow = remote.stream("Once", max_tokens=900, seed=1, temperature=2.0)
    next(slow)
    done = threading.Event()

    def read() -> None:
        for n in range(5):
            remote.complete(f"quick {n}", max_tokens=20, temperature=0)
        done.set()

    threading.Thread(target=read).start()
    assert done.wait(120)
    reply = slow.result()
    deltas = [event for event in slow if isinstance(event, erllama.TextDelta)]
    assert reply.text.endswith("".join(delta.text for delta in deltas))
    # Unread tokens are joined.
    assert sum(len(delta.tokens) for delta in deltas) == len(reply.tokens) - 1
    assert len(deltas) < 300 or len(reply.tokens) < 300


# --- pins --------------------------------------------------------------------------------------------


def test_a_pin_protects_blocks_in_the_process_of_the_model(
    tiny_gguf: Path, remote: erllama.Model, cache: erllama.Cache, tmp_path: Path
) -> None:
    prefix = list(range(10, 110))
    pin = remote.pin(prefix, name="a", ttl="1h")
    assert pin.complete
    remote.evict()
    cache.evict_bytes(10**9, ("ram_file",))
    assert remote.cached_prefix([*prefix, 5]) == 100
    assert remote.complete([*prefix, 5], max_tokens=1, temperature=0).cache.tokens == 100
    remote.unload()
    disk = tmp_path / "disk"
    with erllama.Cache(ram=None, ram_file=tmp_path / "blocks", disk=disk, block_size=16) as both:
        with erllama.load_model(tiny_gguf, cache=both, process=True, **OPTIONS) as model:  # type: ignore[arg-type]
            model.pin(prefix, name="a")
            assert [each.name for each in both.pins()] == ["a"]
        both.unpin("a")
        assert both.pins() == []


def test_pins_are_read_into_the_memory_of_a_models_process(tiny_gguf: Path, tmp_path: Path) -> None:
    prefix = list(range(10, 110))
    with erllama.Cache(ram=0, disk=tmp_path / "disk", block_size=16) as cache:
        with erllama.load_model(tiny_gguf, cache=cache, **OPTIONS) as model:  # type: ignore[arg-type]
            model.pin(prefix)
    options = {"ram": 0, "ram_file": tmp_path / "memory", "disk": tmp_path / "disk", "block_size": 16}
    with erllama.Cache(**options) as cache:  # type: ignore[arg-type]
        with erllama.load_model(tiny_gguf, cache=cache, process=True, **OPTIONS) as model:  # type: ignore[arg-type]
            wait_until(lambda: cache.counters()["blocks_ram_file"] == 7)
            assert model.complete(prefix, max_tokens=1).cache.tier == "ram_file"
