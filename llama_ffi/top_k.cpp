// Selects the largest numbers of a row. A decode leaves the row outside the caches of the processor, so the row is
// read once, from its first number to its last: the search keeps a lower bound of the k largest so far, and looks only
// at blocks with a number beyond that bound. The bound rises quickly, so few blocks have one.
#include "top_k.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int32_t block = 32;  // numbers that are compared at once; a larger block has more numbers to look at

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

// Returns a key that rises as numbers fall, ties by rising position: the number in the high bits, the position in the low.
uint64_t key_of(float number, int32_t position) {
    int32_t bits;
    number += 0.0f;  // -0.0 becomes 0.0
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t rising = (uint32_t) bits ^ ((uint32_t) (bits >> 31) | 0x80000000u);
    return (uint64_t) ~rising << 32 | (uint32_t) position;
}

// Whether a block has a number above the bound, or NaN. Compilers vectorize it, because it has no branch.
INLINE bool exceeds(const float *numbers, float bound) {
    int32_t found = 0;
    for (int32_t i = 0; i < block; i++) {
        found |= !(numbers[i] <= bound);
    }
    return found != 0;
}

// Returns where the next whole block begins that exceeds the bound; otherwise where the numbers begin that do not fill a
// block.
INLINE int32_t find_block(const float *row, int32_t at, int32_t n, float bound) {
    while (n - at >= block && !exceeds(row + at, bound)) {
        at += block;
    }
    return at;
}

using block_finder = int32_t (*)(const float *row, int32_t at, int32_t n, float bound);

int32_t find_block_anywhere(const float *row, int32_t at, int32_t n, float bound) {
    return find_block(row, at, n, bound);
}

#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2"))) int32_t find_block_avx2(const float *row, int32_t at, int32_t n, float bound) {
    return find_block(row, at, n, bound);
}

const block_finder next_block = __builtin_cpu_supports("avx2") ? find_block_avx2 : find_block_anywhere;
#else
const block_finder next_block = find_block_anywhere;
#endif

}  // namespace

// Drops all but the k largest. A later number that equals the bound comes after all of them.
void largest_numbers::drop() {
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.begin() + n_keys);
    n_keys = k;
}

// Adds the numbers above the bound, at most a block. Returns the position of the first NaN among them, or -1.
int32_t largest_numbers::add(const float *row, int32_t begin, int32_t end) {
    size_t i = n_keys;
    for (int32_t at = begin; at < end; at++) {
        // Without a branch, which the processor could not predict.
        keys[n_keys] = (uint64_t) at;
        n_keys += !(row[at] <= bound);
    }
    for (; i < n_keys; i++) {
        const int32_t at = (int32_t) keys[i];
        if (row[at] != row[at]) {
            return at;
        }
        keys[i] = key_of(row[at], at);
    }
    if (n_keys >= 2 * (size_t) k) {
        drop();
        bound = row[position(k - 1)];
    }
    return -1;
}

bool largest_numbers::find(const float *row, int32_t n) {
    keys.resize(2 * (size_t) k + block);
    n_keys = 0;
    int32_t nan = -1;
    for (int32_t i = 0; i < k && nan < 0; i++) {
        keys[n_keys++] = key_of(row[i], i);
        nan = row[i] != row[i] ? i : -1;
    }
    if (nan < 0) {
        drop();
        bound = row[position(k - 1)];
    }
    for (int32_t at = k; at < n && nan < 0;) {
        at = next_block(row, at, n, bound);
        const int32_t end = std::min(n, at + block);
        nan = add(row, at, end);
        at = end;
    }
    if (nan >= 0) {
        keys[0] = (uint64_t) nan;
        return false;
    }
    drop();
    std::sort(keys.begin(), keys.begin() + k);
    return true;
}
