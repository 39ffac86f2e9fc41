// Functions shared by the programs that time libllama.

#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

using Clock = std::chrono::steady_clock;

// Read the numbers in a file. Ends the program if the file cannot be read.
template <class Number> inline std::vector<Number> read_numbers(const char * path) {
    FILE * file = std::fopen(path, "rb");
    if (!file) {
        std::perror(path);
        std::exit(1);
    }
    std::vector<Number> found;
    Number buffer[4096];
    while (size_t n = std::fread(buffer, sizeof(Number), 4096, file)) {
        found.insert(found.end(), buffer, buffer + n);
    }
    std::fclose(file);
    return found;
}

// The array is reused between samples, as in llama-server, and filled again for each.
inline llama_token_data_array filled(std::vector<llama_token_data> & candidates, const float * logits) {
    for (size_t id = 0; id < candidates.size(); id++) {
        candidates[id] = llama_token_data{(llama_token) id, logits[id], 0.0f};
    }
    return {candidates.data(), candidates.size(), -1, false};
}

// The mean of durations, in nanoseconds.
inline double mean(Clock::duration spent, size_t n) {
    return std::chrono::duration<double, std::nano>(spent).count() / n;
}
