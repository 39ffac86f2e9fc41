/* Selects the largest numbers of a row. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

/* Finds the positions of the k largest of n numbers, largest first, ties by rising position; 1 <= k <= n. Keeps its
 * memory from row to row. */
class largest_numbers {
  public:
    explicit largest_numbers(int32_t k) : k(k) {}

    /* Returns false if a number is NaN. Then only position(0) is defined: that of the first NaN. */
    bool find(const float *row, int32_t n);

    int32_t position(int32_t i) const { return (int32_t) (uint32_t) keys[i]; }

  private:
    const int32_t k;
    std::vector<uint64_t> keys; /* of the k largest so far, and of numbers that may be among them */
    size_t n_keys = 0;
    float bound = 0.0f; /* the smallest of the k largest so far */

    void drop();
    int32_t add(const float *row, int32_t begin, int32_t end);
};
