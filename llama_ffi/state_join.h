/* Joins the states of consecutive positions of one sequence into a single state. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

/* Bytes that keep their memory: the first touch of fresh memory costs more than the copy into it. */
struct state_buffer {
    std::unique_ptr<uint8_t[]> bytes;
    size_t capacity = 0;
    size_t size = 0; /* of the joined state */
};

/* Joins n states into `joined`, in their order. They must be of full attention with one position per cell, as libllama
   serialises it, and agree in their layers, types and row sizes. Returns false for states of another layout; `joined`
   is then undefined. Checks every length. Does not check positions. */
bool join_states(const uint8_t *const *states, const uint64_t *sizes, int32_t n, state_buffer &joined);
