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
        : mask_(mask), at_(begin), end_(end), k_(static_cast<const char *>(k)), v_(static_cast<const char *>(v)),
          k_step_(k_step), k_size_(k_size), v_step_(v_step), v_size_(v_size) {
        for (int64_t &cell : ahead_) {
            cell = mask_ ? fetch() : end_;
        }
    }

    // The next cell that counts; `end` after the last.
    int64_t next() {
        int64_t &cell = ahead_[first_++ % n_ahead];
        const int64_t found = cell;
        cell = fetch();
        return found;
    }

private:
    static constexpr unsigned n_ahead = 8;
    static constexpr uint16_t masked = 0xFC00;

    int64_t fetch() {
        const int64_t cell = find();
        if (cell < end_) {
            prefetch(k_ + cell * k_step_, k_size_);
            prefetch(v_ + cell * v_step_, v_size_);
        }
        return cell;
    }

    static void prefetch(const char *row, size_t size) {
        for (size_t at = 0; at < size; at += 64) {
            __builtin_prefetch(row + at);
        }
    }

    int64_t find() {
#if defined(__AVX2__)
        while (unmasked_ == 0 && at_ + 16 <= end_) {
            const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(mask_ + at_));
            const __m256i same = _mm256_cmpeq_epi16(sixteen, _mm256_set1_epi16(static_cast<short>(masked)));
            unmasked_ = ~static_cast<uint32_t>(_mm256_movemask_epi8(same)) & 0x55555555u;  // a bit of each two
            at_ += 16;
        }
        if (unmasked_ != 0) {
            const int64_t cell = at_ - 16 + __builtin_ctz(unmasked_) / 2;
            unmasked_ &= unmasked_ - 1;
            return cell;
        }
#endif
        while (at_ < end_ && mask_[at_] == masked) {
            at_++;
        }
        return at_ < end_ ? at_++ : end_;
    }

    const uint16_t *mask_;
    int64_t at_, end_;  // the first cell that was not looked at, and the first after all
    const char *k_, *v_;
    size_t k_step_, k_size_, v_step_, v_size_;
    int64_t ahead_[n_ahead];
    unsigned first_ = 0;
#if defined(__AVX2__)
    uint32_t unmasked_ = 0;  // of the sixteen before `at_`, those not given out yet
#endif
};
