"""Changes the copy of llama.cpp's source that build_llama.sh builds: `patch_ggml.py SOURCE [--fixes-only]`.

Each change for speed has a header beside this file, which explains it. llama.cpp's own tools get the fixes alone.
The script stops if the source is another one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
FOLDER = Path("ggml/src/ggml-cpu")
INCLUDE = '#include "ops.h"\n'


class Change(NamedTuple):
    """A text that occurs exactly once in a file, and its replacement. The path is relative to the source."""

    file: Path
    old: str
    new: str


# unmasked_cells.h
CELL_LOOP = "for (int64_t ic = ic_start; ic < ic_end; ++ic) {\n"
CELLS = """erl_unmasked_cells erl_cells(
    mp, ic_start, ic_end,
    (const char *) k->data + ik2*nbk2 + ik3*nbk3, nbk1, ggml_row_size(k->type, DK),
    (const char *) v->data + iv2*nbv2 + iv3*nbv3, nbv1, ggml_row_size(v->type, DV));
"""
SKIP = "if (mp && (ic = erl_cells.next(ic)) == ic_end) { break; }\n"

# attention_chunks.h: the parts of the loop over the cells of one token
CHUNK_SIZE = "        const int64_t chunk_size = (nek1 + nth - 1) / nth;\n\n        // Partials"
NEW_CHUNK_SIZE = """        // Heads with masks of their own are split by cells.
        const ggml_tensor * mask_tensor = dst->src[3];
        const ggml_fp16_t * mask =
            mask_tensor && mask_tensor->ne[2] == 1 ? (const ggml_fp16_t *) mask_tensor->data : nullptr;
        const int64_t chunk_size = erl_chunk_cells;
        const int64_t n_chunks   = std::max<int64_t>(1, erl_n_chunks(erl_count_unmasked(mask, 0, nek1)));

        // Partials"""
CHUNKS_BEGIN = "        const int64_t ic_start = ith * chunk_size;\n"
CHUNKS_END = "        ggml_barrier(params->threadpool);\n        ggml_flash_attn_ext_reduce_partials("
NEW_CHUNKS = """        const int64_t partial_stride = n_chunks * partial_size;

        int64_t cell = 0;
        for (int64_t chunk = 0; chunk < n_chunks; chunk++) {
            const int64_t end = chunk + 1 < n_chunks ? erl_chunk_end(mask, cell, nek1) : nek1;
            const int64_t head_start = erl_first_head(ith,     nth, neq2, n_chunks, chunk);
            const int64_t head_end   = erl_first_head(ith + 1, nth, neq2, n_chunks, chunk);
            if (head_start < head_end) {
                ggml_compute_forward_flash_attn_ext_f16_one_chunk(
                    params, dst, head_start, head_end, cell, end,
                    partials_base + chunk * partial_size, partial_stride);
            }
            cell = end;
        }

"""

# thread_waits.h: the barrier, and the waits of the workers
SPIN = """    while (atomic_load_explicit(&tp->n_barrier_passed, memory_order_relaxed) == n_passed) {
        ggml_thread_cpu_relax();
    }
"""
NEW_SPIN = """    erl_wait_for_change(
        &tp->n_barrier_passed, n_passed, &tp->n_barrier_sleepers, ggml_thread_cpu_relax);
"""
PASS = "        atomic_fetch_add_explicit(&tp->n_barrier_passed, 1, memory_order_seq_cst);\n"
WAKE = "        erl_end_waits(&tp->n_barrier_passed, &tp->n_barrier_sleepers);\n"
PASSED_FIELD = "    atomic_int GGML_CACHE_ALIGN n_barrier_passed;\n"
SLEEPERS_FIELD = "    atomic_int n_barrier_sleepers;\n"
PASSED_START = "        threadpool->n_barrier_passed = 0;\n"
SLEEPERS_START = "        threadpool->n_barrier_sleepers = 0;\n"
GRAPH_FIELD = "    int  last_graph;\n"
ASLEEP_FIELD = "    atomic_int asleep;  // 1: waits to be woken\n"
ROUNDS = "    const uint64_t n_rounds = 1024UL * 128 * threadpool->poll;\n"
NEW_ROUNDS = """    UNUSED(threadpool);
    static _Thread_local erl_spin_history history = {erl_work_spin_ns, 0};
    erl_spin spin = erl_begin_spin(&history, erl_work_spin_ns);
"""
POLL = "    for (uint64_t i=0; !ggml_graph_compute_thread_ready(state) && i < n_rounds; i++) {\n"
NEW_POLL = "    while (!ggml_graph_compute_thread_ready(state) && erl_spins(&spin)) {\n"
POLL_END = """    return state->pending;
}

static inline bool ggml_graph_compute_check_for_work("""
END_SPIN = "    erl_end_spin(&history, erl_work_spin_ns, state->pending);\n"
SLEEP_BEGIN = """    ggml_mutex_lock_shared(&threadpool->mutex);
    while (!ggml_graph_compute_thread_ready(state)) {
"""
SLEEP_END = """    ggml_mutex_unlock_shared(&threadpool->mutex);

    return state->pending;
"""
NEW_SLEEP = """    erl_announce_sleep(&state->asleep);
    if (!ggml_graph_compute_thread_ready(state)) {
        erl_sleep(&state->asleep, 1);
    }
    atomic_store(&state->asleep, 0);
    ggml_graph_compute_thread_sync(state);

    return state->pending;
"""
KICKOFF_END = """    } else {
       ggml_cond_broadcast(&threadpool->cond);
    }

    ggml_mutex_unlock"""
NEW_KICKOFF_END = """    }
    for (int j = 1; j < n_threads; j++) {
        erl_wake_worker(&threadpool->workers[j].asleep);
    }

    ggml_mutex_unlock"""
JOIN = "        int32_t rc = ggml_thread_join("
WAKE_TO_JOIN = "        erl_wake_worker(&workers[j].asleep);\n"

# GCC's _tile_loadconfig declares that it reads the first 8 bytes of a configuration of 64. The compiler then omits
# the stores to the others, and the first product on a processor with AMX ends the process.
LOAD_TILES = "    _tile_loadconfig(&tc);\n"
STORE_TILES = '    __asm__ volatile("" : : "r"(&tc) : "memory");  // all of tc is stored before it is loaded\n'

# A decode compares all pairs of its sequences. With one pool of cells, the release compares the pairs of 256,
# which takes 0.1 ms. Here it compares those that the context has. The binding refuses numbers beyond them.
SEQUENCES = """    const uint32_t n_seq_max = cparams.kv_unified ? LLAMA_MAX_SEQ : cparams.n_seq_max;

    // embedding contexts"""
NEW_SEQUENCES = """    const uint32_t n_seq_max = cparams.n_seq_max;

    // embedding contexts"""


def fixes() -> list[Change]:
    """Return the changes without which the release does not run on some processors."""
    return [Change(FOLDER / "amx/mmq.cpp", LOAD_TILES, STORE_TILES + LOAD_TILES)]


def changes(source: Path) -> list[Change]:
    """Return the changes for speed. Two of them replace everything between a first and a last text."""
    ops, cpu = FOLDER / "ops.cpp", FOLDER / "ggml-cpu.c"
    ops_code, cpu_code = ((source / path).read_text() for path in (ops, cpu))
    includes = '#include "attention_chunks.h"\n#include "thread_waits.h"\n'
    return [
        Change(ops, CELL_LOOP, CELLS + CELL_LOOP + SKIP),
        Change(ops, CHUNK_SIZE, NEW_CHUNK_SIZE),
        Change(ops, between(ops_code, CHUNKS_BEGIN, CHUNKS_END), NEW_CHUNKS),
        Change(ops, "reduce_partials(params, dst, nth, chunk", "reduce_partials(params, dst, n_chunks, chunk"),
        Change(ops, INCLUDE, INCLUDE + '#include "attention_chunks.h"\n#include "unmasked_cells.h"\n'),
        Change(cpu, "size_t n_chunks = n_tasks;", "size_t n_chunks = erl_n_chunks(node->src[1]->ne[1]);"),
        Change(cpu, PASSED_FIELD, PASSED_FIELD + SLEEPERS_FIELD),
        Change(cpu, PASSED_START, PASSED_START + SLEEPERS_START),
        Change(cpu, GRAPH_FIELD, GRAPH_FIELD + ASLEEP_FIELD),
        Change(cpu, SPIN, NEW_SPIN),
        Change(cpu, PASS, PASS + WAKE),
        Change(cpu, ROUNDS, NEW_ROUNDS),
        Change(cpu, POLL, NEW_POLL),
        Change(cpu, POLL_END, END_SPIN + POLL_END),
        Change(cpu, between(cpu_code, SLEEP_BEGIN, SLEEP_END), ""),
        Change(cpu, SLEEP_END, NEW_SLEEP),
        Change(cpu, KICKOFF_END, NEW_KICKOFF_END),
        Change(cpu, JOIN, WAKE_TO_JOIN + JOIN),
        Change(cpu, INCLUDE, INCLUDE + includes),
        Change(Path("src/llama-context.cpp"), SEQUENCES, NEW_SEQUENCES),
    ]


def between(code: str, first: str, last: str) -> str:
    """Return the text from the start of `first` to the start of `last`. Each occurs once."""
    for text in (first, last):
        if code.count(text) != 1:
            sys.exit(f"patch_ggml: error: {text!r} occurs {code.count(text)} times")
    return code[code.index(first) : code.index(last)]


def main(source: Path, *, fixes_only: bool) -> None:
    for change in fixes() if fixes_only else [*fixes(), *changes(source)]:
        path = source / change.file
        code = path.read_text()
        if code.count(change.old) != 1:
            sys.exit(f"patch_ggml: error: {path}: {change.old!r} occurs {code.count(change.old)} times")
        path.write_text(code.replace(change.old, change.new))
    if fixes_only:
        return
    for header in ("attention_chunks.h", "thread_waits.h", "unmasked_cells.h"):
        shutil.copy(HERE / header, source / FOLDER)


if __name__ == "__main__":
    main(Path(sys.argv[1]), fixes_only="--fixes-only" in sys.argv[2:])
