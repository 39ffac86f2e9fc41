// Added to llama.cpp's attention on the CPU by build_llama.sh.
//
// To compute the attention of one token, the original code splits the cells into as many parts as there are threads,
// and adds the results of the parts. So the last bits of the result depend on the number of threads, and on where the
// cells of the sequence are. Here a part is a chunk: a fixed number of the sequence's own cells, which are those that
// are not masked. So the number of threads may change between two tokens, and the cells may be anywhere.
#pragma once

#include <stdint.h>

// Unmasked cells of a chunk. A chunk's sums cost about as much as three cells.
enum { erl_chunk_cells = 256 };

static inline int64_t erl_n_chunks(int64_t n_cells) { return (n_cells + erl_chunk_cells - 1) / erl_chunk_cells; }

// The unmasked cells from `begin` to `end`. `mask`: half-precision numbers, one per cell; minus infinity if the cell is
// masked. Without a mask, all cells count.
static inline int64_t erl_count_unmasked(const uint16_t *mask, int64_t begin, int64_t end) {
    if (!mask) {
        return end - begin;
    }
    int32_t n = 0;
    for (int64_t i = begin; i < end; i++) {
        n += mask[i] != 0xFC00;
    }
    return n;
}

// The end of the chunk that begins at `begin`, of `n_cells` cells.
static inline int64_t erl_chunk_end(const uint16_t *mask, int64_t begin, int64_t n_cells) {
    enum { step = 64 };
    int64_t left = erl_chunk_cells;
    for (int64_t at = begin; at < n_cells; at += step) {
        const int64_t end = at + step < n_cells ? at + step : n_cells;
        const int64_t n = erl_count_unmasked(mask, at, end);
        if (n < left) {
            left -= n;
            continue;
        }
        while (left > 0) {
            left -= !mask || mask[at] != 0xFC00;
            at++;
        }
        return at;
    }
    return n_cells;
}

// The first head whose part of `chunk` belongs to thread `thread` of `n_threads` or to a later one. The work is split by
// heads first, so that each thread reads the cells of as few heads as possible.
static inline int64_t erl_first_head(int64_t thread, int64_t n_threads, int64_t n_heads, int64_t n_chunks,
                                     int64_t chunk) {
    const int64_t begin = thread * n_heads * n_chunks / n_threads - chunk;
    return begin <= 0 ? 0 : (begin + n_chunks - 1) / n_chunks;
}
