// Added to llama.cpp's attention on the CPU by build_llama.sh.
//
// All sequences share one pool of cells. For each row of a batch, the cells of other sequences are masked. The
// original kernel reads the mask of every cell, for every head of every layer, and the unmasked cells are far apart,
// so the processor does not prefetch them. This class finds the unmasked cells, many masks at a time, and prefetches
// their K and V. The kernel uses the same cells in the same order: all bits of the result are the same.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

class erl_unmasked_cells {
public:
    // `mask`: half-precision numbers, one per cell; minus infinity if the cell is masked. `k`, `v`: the rows of cell 0.
    // Rows are `k_step` and `v_step` bytes apart and have `k_size` and `v_size` bytes.
    erl_unmasked_cells(const uint16_t *mask, int64_t begin, int64_t end, const void *k, size_t k_step, size_t k_size,
                       const void *v, size_t v_step, size_t v_size)
        : mask_(mask), at_(begin), end_(mask ? end : begin), k_(static_cast<const char *>(k)),
          v_(static_cast<const char *>(v)), k_step_(k_step), k_size_(k_size), v_step_(v_step), v_size_(v_size) {
        for (group &ahead : ahead_) {
            ahead = scan();
        }
    }

    // Return the first unmasked cell from `cell` on that was not returned before; `end` after the last one.
    int64_t next(int64_t cell) {
        if (cell < dense_end_) {
            return cell;
        }
        if (now_.counts == 0) {
            now_ = ahead_[first_ % n_ahead];
            ahead_[first_++ % n_ahead] = scan();
            if (now_.counts == all) {
                now_.counts = 0;
                dense_end_ = now_.begin + width;
                return now_.begin;
            }
            if (now_.counts == 0) {
                return end_;
            }
        }
        const int64_t found = now_.begin + __builtin_ctz(now_.counts);
        now_.counts &= now_.counts - 1;
        return found;
    }

private:
    static constexpr int64_t width = 16;
    static constexpr uint32_t all = 0xFFFF;
    static constexpr unsigned n_ahead = 4;

    // Consecutive cells, with a bit set for each unmasked cell.
    struct group {
        int64_t begin = 0;
        uint32_t counts = 0;
    };

    // Return the next group with an unmasked cell; an empty group after the last one.
    group scan() {
        group found;
        while (found.counts == 0 && at_ < end_) {
            found.begin = at_;
            found.counts = at_ + width <= end_ ? whole(mask_ + at_) : part(mask_ + at_, end_ - at_);
            at_ += width;
        }
        if (found.counts != all) {  // the processor prefetches adjacent cells itself
            for (uint32_t left = found.counts; left != 0; left &= left - 1) {
                const int64_t cell = found.begin + __builtin_ctz(left);
                prefetch(k_ + cell * k_step_, k_size_);
                prefetch(v_ + cell * v_step_, v_size_);
            }
        }
        return found;
    }

    static uint32_t part(const uint16_t *mask, int64_t n) {
        uint32_t counts = 0;
        for (int64_t i = 0; i < n; i++) {
            counts |= static_cast<uint32_t>(mask[i] != 0xFC00) << i;
        }
        return counts;
    }

    static uint32_t whole(const uint16_t *mask) {
#if defined(__AVX2__)
        const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(mask));
        const __m256i same = _mm256_cmpeq_epi16(sixteen, _mm256_set1_epi16(static_cast<short>(0xFC00)));
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(same), _mm256_extracti128_si256(same, 1));
        return all & ~static_cast<uint32_t>(_mm_movemask_epi8(bytes));
#else
        return part(mask, width);
#endif
    }

    static void prefetch(const char *row, size_t size) {
        for (size_t at = 0; at < size; at += 64) {
            __builtin_prefetch(row + at);
        }
    }

    const uint16_t *mask_;
    int64_t at_, end_;  // the first cell that was not checked, and the end of all cells
    const char *k_, *v_;
    size_t k_step_, k_size_, v_step_, v_size_;
    group ahead_[n_ahead];
    unsigned first_ = 0;
    group now_;
    int64_t dense_end_ = INT64_MIN;  // all cells before it are unmasked, from the last returned one on
};
