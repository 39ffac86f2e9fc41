// Added to llama.cpp's attention on the CPU by build_llama.sh.
//
// To compute the attention of one token, the original code splits the cells into as many parts as there are threads,
// and adds the results of the parts. So the last bits of the result depend on the number of threads. With chunks of a
// fixed size they do not: the number of threads may change between two tokens.
#pragma once

#include <stdint.h>

// Cells of a chunk. libllama uses cells in multiples of it. A chunk's sums cost about as much as three cells.
enum { erl_chunk_cells = 256 };

static inline int64_t erl_n_chunks(int64_t n_cells) { return (n_cells + erl_chunk_cells - 1) / erl_chunk_cells; }

// The first head whose part of `chunk` belongs to thread `thread` of `n_threads` or to a later one. The work is split by
// heads first, so that each thread reads the cells of as few heads as possible.
static inline int64_t erl_first_head(int64_t thread, int64_t n_threads, int64_t n_heads, int64_t n_chunks,
                                     int64_t chunk) {
    const int64_t begin = thread * n_heads * n_chunks / n_threads - chunk;
    return begin <= 0 ? 0 : (begin + n_chunks - 1) / n_chunks;
}
