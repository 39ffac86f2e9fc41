// Joins the states of consecutive positions into one. libllama restores a state in time that grows with the number of
// all cells in the context, because it looks at each cell three times. For many small blocks that costs more than
// their bytes, and one joined state pays it once.
//
// The layout is what llama_kv_cache::state_write of the pinned release writes: a head, three integers for each cell,
// then for each layer the rows of K, then for each layer those of V. A row holds one cell, or, for V without flash
// attention, one element of all cells. A layout that differs is refused, so the caller restores such states one by one.
#include "state_join.h"

#include <cstring>
#include <vector>

namespace {

constexpr size_t cell_bytes = 12;     // position, sequences, sequence
constexpr size_t section_bytes = 12;  // type and row size of K or V; for transposed V type, element size and rows
constexpr uint64_t max_cells = 1u << 30;

struct cursor {
    const uint8_t *at;
    const uint8_t *end;
    uint64_t n_cells;

    uint64_t left() const { return (uint64_t) (end - at); }
};

template <typename T>
T read(const uint8_t *at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

class joiner {
  public:
    joiner(std::vector<cursor> states, state_buffer &joined) : states(std::move(states)), joined(joined) {}

    bool join() { return heads() && sections(); }

  private:
    std::vector<cursor> states;
    state_buffer &joined;

    void append(const uint8_t *bytes, size_t n) {
        std::memcpy(joined.bytes.get() + joined.size, bytes, n);
        joined.size += n;
    }

    // Takes n bytes that all states have in common. Returns null if they differ.
    const uint8_t *common(size_t n) {
        const uint8_t *first = states[0].at;
        for (cursor &state : states) {
            if (state.left() < n || std::memcmp(state.at, first, n) != 0) {
                return nullptr;
            }
            state.at += n;
        }
        append(first, n);
        return first;
    }

    bool heads() {
        if (!common(sizeof(uint32_t))) {  // magic
            return false;
        }
        // The sequence that a state was read from. libllama ignores it, and it depends on the number of sequences.
        for (cursor &state : states) {
            if (state.left() < sizeof(uint32_t)) {
                return false;
            }
            state.at += sizeof(uint32_t);
        }
        append(states[0].at - sizeof(uint32_t), sizeof(uint32_t));
        const uint8_t *n_streams = common(sizeof(uint32_t));
        if (!n_streams || read<uint32_t>(n_streams) != 1) {
            return false;
        }
        uint64_t total = 0;
        for (cursor &state : states) {
            if (state.left() < sizeof(uint32_t)) {
                return false;
            }
            state.n_cells = read<uint32_t>(state.at);
            state.at += sizeof(uint32_t);
            total += state.n_cells;
            if (state.n_cells == 0 || total > max_cells || state.left() / cell_bytes < state.n_cells) {
                return false;
            }
        }
        const uint32_t n_cells = (uint32_t) total;
        append((const uint8_t *) &n_cells, sizeof n_cells);
        for (cursor &state : states) {
            append(state.at, state.n_cells * cell_bytes);
            state.at += state.n_cells * cell_bytes;
        }
        return true;
    }

    bool sections() {
        const uint8_t *head = common(2 * sizeof(uint32_t));
        if (!head) {
            return false;
        }
        const bool transposed = read<uint32_t>(head) != 0;
        const uint32_t n_layers = read<uint32_t>(head + 4);
        for (uint32_t layer = 0; layer < n_layers; layer++) {
            if (!section(false)) {
                return false;
            }
        }
        while (states[0].left() > 0) {  // V: not every layer has it
            if (!section(transposed)) {
                return false;
            }
        }
        for (const cursor &state : states) {
            if (state.left() > 0) {
                return false;
            }
        }
        return true;
    }

    bool section(bool transposed) {
        const uint8_t *head = common(section_bytes);
        if (!head) {
            return false;
        }
        const uint64_t width = transposed ? read<uint32_t>(head + 4) : read<uint64_t>(head + 4);
        const uint64_t n_rows = transposed ? read<uint32_t>(head + 8) : 1;
        for (const cursor &state : states) {
            // Divisions, because products of untrusted numbers may overflow.
            if (width == 0 || n_rows == 0 || state.left() / state.n_cells / width < n_rows) {
                return false;
            }
        }
        for (uint64_t row = 0; row < n_rows; row++) {
            for (const cursor &state : states) {
                append(state.at + row * state.n_cells * width, state.n_cells * width);
            }
        }
        for (cursor &state : states) {
            state.at += n_rows * state.n_cells * width;
        }
        return true;
    }
};

}  // namespace

bool join_states(const uint8_t *const *states, const uint64_t *sizes, int32_t n, state_buffer &joined) {
    std::vector<cursor> cursors;
    size_t total = 0;
    for (int32_t i = 0; i < n; i++) {
        cursors.push_back({states[i], states[i] + sizes[i], 0});
        total += sizes[i];
    }
    if (cursors.empty()) {
        return false;
    }
    if (joined.capacity < total) {
        joined.capacity = 0;
        joined.bytes.reset(new uint8_t[total]);
        joined.capacity = total;
    }
    joined.size = 0;
    return joiner(std::move(cursors), joined).join();
}
