// Added to llama.cpp's attention on the CPU by build_llama.sh.
//
// Cells of all sequences lie in one pool, so that they can be shared. To each row of a batch, those of other
// sequences are masked; the kernel looks at the mask of every cell, for every head of every layer, and those that
// count lie far apart, where no processor foresees them. This finds the cells that count, many masks at a time, and
// has their K and V fetched ahead. The same cells are computed with, in the same order: no bit of the result differs.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

class erl_unmasked_cells {
public:
    // `mask`: half-precision numbers, one for each cell; minus infinity where it is masked. `k`, `v`: the rows of
    // cell 0; each next one `k_step`, `v_step` bytes on, and `k_size`, `v_size` of them are read.
    erl_unmasked_cells(const uint16_t *mask, int64_t begin, int64_t end, const void *k, size_t k_step, size_t k_size,
                       const void *v, size_t v_step, size_t v_size)
        : mask_(mask), at_(begin), end_(mask ? end : begin), k_(static_cast<const char *>(k)),
          v_(static_cast<const char *>(v)), k_step_(k_step), k_size_(k_size), v_step_(v_step), v_size_(v_size) {
        for (group &ahead : ahead_) {
            ahead = scan();
        }
    }

    // The first cell that counts, of those from `cell` on that were not given before; `end` after the last.
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

    // Cells that follow one another; a bit is set for each that counts.
    struct group {
        int64_t begin = 0;
        uint32_t counts = 0;
    };

    // The next group in which any counts; an empty one after the last.
    group scan() {
        group found;
        while (found.counts == 0 && at_ < end_) {
            found.begin = at_;
            found.counts = at_ + width <= end_ ? whole(mask_ + at_) : part(mask_ + at_, end_ - at_);
            at_ += width;
        }
        if (found.counts != all) {  // what lies side by side, the processor foresees
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
    int64_t at_, end_;  // the first cell that was not looked at, and the first after all
    const char *k_, *v_;
    size_t k_step_, k_size_, v_step_, v_size_;
    group ahead_[n_ahead];
    unsigned first_ = 0;
    group now_;
    int64_t dense_end_ = INT64_MIN;  // all cells before it count, from the last given on
};
