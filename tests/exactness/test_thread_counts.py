"""The number of threads may change between two decodes: results keep their bits where bits are promised."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.engine.backends.thread_choice import ThreadSearch
from erllama.engine.processors import ThreadDefault
from erllama.llama_ffi import LlamaContext, LlamaModel
from erllama.testing.models import TINY, write_gemma3, write_lfm2, write_llama, write_mamba
from support.paths import ROOT
from support.recording_backend import RecordingBackend, llama_backend, prompt_of, same_bits

COMPILER = shlex.split(os.environ.get("CC", "cc"))
MOST = 4
# One token decodes with few cells and with many, and slices of odd sizes.
BATCHES = (300, 1, 1, 37, 3, 400, 1, 1, 7, 1)


def needs_same_bits(backend: object) -> None:
    if not getattr(getattr(backend, "threads", None), "_same_bits", False):
        pytest.skip("the bits of this build depend on the number of threads")


def quantized(path: Path) -> Path:
    return write_llama(path, TINY, seed=1, quantization="Q8_0")


def logits_with(path: Path, numbers: Sequence[int], flash_attn: bool) -> list[NDArray[np.float32]]:
    """Return the logits of the last rows of batches, computed by these numbers of threads in turn."""
    tokens = prompt_of(3, sum(BATCHES))
    found, start = [], 0
    with (
        LlamaModel(path) as model,
        LlamaContext(model, n_ctx=1024, n_ubatch=512, n_threads=MOST, n_threads_batch=MOST, flash_attn=flash_attn)
        as context,
    ):  # fmt: skip
        for i, n in enumerate(BATCHES):
            context.set_threads(numbers[i % len(numbers)])
            output = np.zeros(n, np.int8)
            output[-1] = 1
            positions = np.arange(start, start + n, dtype=np.int32)
            rows = context.decode(tokens[start : start + n], positions, np.zeros(n, np.int32), output)
            found.append(rows[0].copy())
            start += n
    return found


@pytest.mark.parametrize("write", [write_llama, quantized, write_gemma3, write_mamba, write_lfm2])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_any_number_of_threads_computes_the_same_bits(
    tmp_path: Path, write: Callable[[Path], Path], flash_attn: bool
) -> None:
    path = write(tmp_path / "model.gguf")
    backend = llama_backend(path)
    backend.close()
    needs_same_bits(backend)
    expected = logits_with(path, [1], flash_attn)
    for numbers in ([2], [3], [4], [3, 1, 4, 2]):
        assert same_bits(logits_with(path, numbers, flash_attn), expected), numbers


@pytest.mark.parametrize("n_others", [1, 300, 777])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_token_has_the_same_bits_wherever_its_cells_are(tiny_gguf: Path, n_others: int, n_threads: int) -> None:
    backend = llama_backend(tiny_gguf)
    backend.close()
    needs_same_bits(backend)
    tokens, n = prompt_of(3, 601), 600

    def decode(context: LlamaContext, ids: NDArray[np.int32], start: int, sequence: int) -> NDArray[np.float32]:
        output = np.zeros(len(ids), np.int8)
        output[-1] = 1
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        return context.decode(ids, positions, np.full(len(ids), sequence, np.int32), output)[0].copy()

    with (
        LlamaModel(tiny_gguf) as model,
        LlamaContext(model, n_ctx=2048, n_batch=1024, n_seq_max=2, n_threads=n_threads, flash_attn=True) as context,
    ):  # fmt: skip
        decode(context, tokens[:n], 0, 0)
        state = context.state(0)
        expected = decode(context, tokens[n:], n, 0)
        context.clear()
        decode(context, prompt_of(4, n_others), 0, 1)
        context.set_state(0, state)
        assert same_bits([decode(context, tokens[n:], n, 0)], [expected])


class RandomThreads(RecordingBackend):
    """A libllama backend that computes with another number of threads at each decode."""

    def __init__(self, path: Path) -> None:
        super().__init__(llama_backend(path, n_ubatch=64, n_threads=None, n_ctx=2048))
        self.threads = self.inner.threads  # type: ignore[attr-defined]


@pytest.fixture
def random_threads(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RandomThreads]:
    dice = random.Random(1)
    monkeypatch.setattr("erllama.engine.backends.llama.default_threads", lambda: ThreadDefault(MOST, "a test"))
    monkeypatch.setattr(ThreadSearch, "number", lambda *_: dice.randint(1, MOST))
    backend = RandomThreads(tiny_gguf)
    yield backend
    backend.inner.close()


def replies(model: erllama.Model, backend: RandomThreads, **options: object) -> list[list[NDArray[np.float32]]]:
    """Return the logits of a cold reply and of replies with every kind of hit."""
    found = []
    for prompt in (prompt_of(1, 700), prompt_of(1, 700), prompt_of(1, 610), prompt_of(1, 700)):
        backend.forget()
        model.complete(prompt, max_tokens=8, temperature=0, **options)  # type: ignore[arg-type]
        found.append(backend.logits)
    return found


def test_hits_have_the_bits_of_a_cold_run_while_threads_change(random_threads: RandomThreads) -> None:
    needs_same_bits(random_threads)
    with erllama.Cache(block_size=32) as cache, erllama.load_backend(random_threads, cache=cache) as model:
        random_threads.close = lambda: None  # type: ignore[method-assign]
        cold, exact, shorter, again = replies(model, random_threads)
        assert same_bits(cold, exact)
        assert same_bits(cold, again)
        assert len(shorter) == 8


@pytest.mark.parametrize("same", [True, False])
def test_reproducible_requests_use_the_number_of_the_recipe(
    random_threads: RandomThreads, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    threads = random_threads.threads
    monkeypatch.setattr(threads, "_same_bits", same)
    used: list[int] = []
    begin = threads.begin
    monkeypatch.setattr(threads, "begin", lambda n_rows: used.append(begin(n_rows)) or used[-1])
    with erllama.Cache(block_size=32) as cache, erllama.load_backend(random_threads, cache=cache) as model:
        random_threads.close = lambda: None  # type: ignore[method-assign]
        model.complete(prompt_of(1, 700), max_tokens=8, temperature=0)
        assert len(set(used)) > 1
        model.evict()
        used.clear()
        reply = model.complete(prompt_of(1, 700), max_tokens=8, temperature=0, reproducible=True)
        assert set(used) == {MOST}
        assert (reply.cache.kind == "cold") == (not same), "its KV has the bits of other numbers of threads"


CHUNKS = r"""
#include <assert.h>
#include <stdlib.h>
#include "attention_chunks.h"

int main(void) {
    static int heads_of[64][64];
    for (int n_threads = 1; n_threads <= 9; n_threads++) {
        for (int n_heads = 1; n_heads <= 33; n_heads += 4) {
            for (int n_cells = 512; n_cells <= 4096; n_cells += 256) {
                const int64_t n_chunks = erl_n_chunks(n_cells);
                for (int i = 0; i < 64 * 64; i++) heads_of[i / 64][i % 64] = 0;
                for (int thread = 0; thread < n_threads; thread++) {
                    for (int64_t chunk = 0; chunk < n_chunks; chunk++) {
                        const int64_t end = erl_first_head(thread + 1, n_threads, n_heads, n_chunks, chunk);
                        int64_t h = erl_first_head(thread, n_threads, n_heads, n_chunks, chunk);
                        for (; h < end; h++) {
                            assert(h < n_heads);
                            heads_of[chunk][h]++;
                        }
                    }
                }
                for (int64_t chunk = 0; chunk < n_chunks; chunk++) {
                    for (int h = 0; h < n_heads; h++) assert(heads_of[chunk][h] == 1);
                }
            }
        }
    }
    static uint16_t mask[3000];
    for (int seed = 0; seed < 50; seed++) {
        srand(seed);
        for (int i = 0; i < 3000; i++) mask[i] = rand() % 50 < seed ? 0 : 0xFC00;
        const int64_t n_chunks = erl_n_chunks(erl_count_unmasked(mask, 0, 3000));
        int64_t begin = 0;
        for (int64_t chunk = 0; chunk + 1 < n_chunks; chunk++) {
            const int64_t end = erl_chunk_end(mask, begin, 3000);
            assert(erl_count_unmasked(mask, begin, end) == erl_chunk_cells && mask[end - 1] == 0);
            begin = end;
        }
        const int64_t rest = erl_count_unmasked(mask, begin, 3000);
        assert(n_chunks == 0 || (0 < rest && rest <= erl_chunk_cells));
    }
    assert(erl_chunk_end(NULL, 512, 700) == 700 && erl_chunk_end(NULL, 0, 700) == erl_chunk_cells);
    return 0;
}
"""

WAITS = r"""
#include <pthread.h>
#include <stdio.h>
#include "thread_waits.h"

enum { n_threads = 3, n_rounds = 3000 };
static atomic_int arrived, passed, sleepers, asleep, work;
static int sums[n_threads];

static void relax(void) {}

static void barrier(void) {
    const int before = atomic_load(&passed);
    if (atomic_fetch_add(&arrived, 1) == n_threads - 1) {
        atomic_store(&arrived, 0);
        atomic_fetch_add(&passed, 1);
        erl_end_waits(&passed, &sleepers);
        return;
    }
    erl_wait_for_change(&passed, before, &sleepers, relax);
}

static void *run(void *number) {
    const int own = (int) (intptr_t) number;
    for (int round = 0; round < n_rounds; round++) {
        if ((round + own) % 100 == 0) {
            struct timespec late = {0, 300 * 1000};  // the others fall asleep
            nanosleep(&late, NULL);
        }
        sums[own]++;
        barrier();
        for (int other = 0; other < n_threads; other++) {
            if (sums[other] != round + 1) return "a thread passed the barrier too early";
        }
        barrier();
    }
    return NULL;
}

static void *worker(void *unused) {
    for (int done = 0; done < n_rounds; done++) {
        while (atomic_load(&work) <= done) {
            erl_announce_sleep(&asleep);
            if (atomic_load(&work) <= done) erl_sleep(&asleep, 1);
            atomic_store(&asleep, 0);
        }
    }
    return unused;
}

int main(void) {
    pthread_t threads[n_threads];
    for (int i = 0; i < n_threads; i++) pthread_create(&threads[i], NULL, run, (void *) (intptr_t) i);
    for (int i = 0; i < n_threads; i++) {
        void *problem;
        pthread_join(threads[i], &problem);
        if (problem) { puts(problem); return 1; }
    }
    pthread_create(&threads[0], NULL, worker, NULL);
    for (int i = 0; i < n_rounds; i++) {
        atomic_fetch_add(&work, 1);
        erl_wake_worker(&asleep);
    }
    pthread_join(threads[0], NULL);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (CHUNKS, ["-fsanitize=address,undefined"]),
        (WAITS, []),
        (WAITS, ["-U__linux__"]),  # the locks of other systems
        (WAITS, ["-fsanitize=thread", "-Wno-error"]),  # gcc warns that it does not check fences
    ],
    ids=["chunks", "waits", "waits-portable", "waits-thread-sanitizer"],
)
def test_the_additions_to_ggml_are_right(tmp_path: Path, program: str, flags: list[str]) -> None:
    source, compiled = tmp_path / "program.c", tmp_path / "program"
    source.write_text(program)
    common = ["-std=gnu11", "-O2", "-Wall", "-Werror", "-pthread", f"-I{ROOT / 'scripts'}"]
    subprocess.run([*COMPILER, *common, *flags, str(source), "-o", compiled], check=True, timeout=120)
    finished = subprocess.run([compiled], capture_output=True, text=True, check=False, timeout=120)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
