// Times libllama's samplers on given logits. benchmarks/sampling.py compiles and runs this program.
//
//   peer_sampling LOGITS CONTEXT N_VOCAB TEMPERATURE PENALTY SEED N_ROUNDS N_EVICT
//
// LOGITS is a file of float32 rows, each of N_VOCAB. CONTEXT is a file of int32 tokens that precede every row. A round
// samples once from each row. Temperature 0 is the greedy sampler; any other is top-k 40, top-p 0.95, min-p 0.05,
// temperature, and the draw, in the order of llama.cpp's tools. A PENALTY other than 1 adds a repetition penalty for
// the last 64 tokens before them. Between two samples, the program writes N_EVICT bytes outside the measured time.
// Prints JSON: "nanoseconds", the mean of a sample for each round, and "tokens", the choices of the last round.

#include "peer.h"

static llama_sampler * make_chain(int32_t n_vocab, float temperature, float penalty, uint32_t seed) {
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (penalty != 1) {
        llama_sampler_chain_add(chain, llama_sampler_init_penalties(n_vocab, 64, penalty, 0, 0));
    }
    if (temperature == 0) {
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        return chain;
    }
    llama_sampler_chain_add(chain, llama_sampler_init_top_k(40));
    llama_sampler_chain_add(chain, llama_sampler_init_top_p(0.95f, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_min_p(0.05f, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_temp(temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(seed));
    return chain;
}

static llama_token sample(llama_sampler * chain, const float * logits, std::vector<llama_token_data> & candidates) {
    llama_token_data_array array = filled(candidates, logits);
    llama_sampler_apply(chain, &array);
    return array.data[array.selected].id;
}

int main(int n_arguments, char ** arguments) {
    if (n_arguments != 9) {
        std::fprintf(
            stderr, "usage: %s LOGITS CONTEXT N_VOCAB TEMPERATURE PENALTY SEED N_ROUNDS N_EVICT\n", arguments[0]);
        return 2;
    }
    const std::vector<float> logits = read_numbers<float>(arguments[1]);
    const std::vector<llama_token> context = read_numbers<llama_token>(arguments[2]);
    const size_t n_vocab = std::strtoull(arguments[3], nullptr, 10);
    const float temperature = std::strtof(arguments[4], nullptr);
    const float penalty = std::strtof(arguments[5], nullptr);
    const uint32_t seed = (uint32_t) std::strtoul(arguments[6], nullptr, 10);
    const size_t n_rounds = std::strtoull(arguments[7], nullptr, 10);
    std::vector<char> evict(std::strtoull(arguments[8], nullptr, 10));
    const size_t n_rows = n_vocab ? logits.size() / n_vocab : 0;
    if (n_rows == 0 || n_rows * n_vocab != logits.size()) {
        std::fprintf(stderr, "%s does not hold rows of %zu\n", arguments[1], n_vocab);
        return 1;
    }

    llama_sampler * chain = make_chain((int32_t) n_vocab, temperature, penalty, seed);
    for (llama_token token : context) {
        llama_sampler_accept(chain, token);
    }
    std::vector<llama_token_data> candidates(n_vocab);
    std::vector<llama_token> tokens(n_rows);
    std::printf("{\"nanoseconds\": [");
    for (size_t round = 0; round <= n_rounds; round++) {  // the first round is a warm-up
        Clock::duration spent{};
        for (size_t row = 0; row < n_rows; row++) {
            for (size_t at = 0; at < evict.size(); at += 64) {
                evict[at]++;
            }
            const Clock::time_point began = Clock::now();
            tokens[row] = sample(chain, logits.data() + row * n_vocab, candidates);
            spent += Clock::now() - began;
        }
        if (round > 0) {
            std::printf("%s%.0f", round > 1 ? ", " : "", mean(spent, n_rows));
        }
    }
    std::printf("], \"tokens\": [");
    for (size_t row = 0; row < n_rows; row++) {
        std::printf("%s%d", row ? ", " : "", tokens[row]);
    }
    std::printf("]}\n");
    llama_sampler_free(chain);
    return 0;
}
