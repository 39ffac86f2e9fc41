// Times libllama's grammar sampler on given logits. benchmarks/grammar.py compiles and runs this program.
//
//   peer_grammar MODEL GRAMMAR TOKENS LOGITS N_ROUNDS
//
// MODEL is a GGUF file, for its vocabulary. GRAMMAR is a GBNF file. TOKENS is a file of int32 tokens that the grammar
// accepts. LOGITS is a file of float32, one per token of the vocabulary. For each of TOKENS, a round applies the grammar
// to all candidates and accepts the token. Prints JSON: "nanoseconds", the mean of an application for each round.

#include <cmath>
#include <string>

#include "peer.h"

int main(int n_arguments, char ** arguments) {
    if (n_arguments != 6) {
        std::fprintf(stderr, "usage: %s MODEL GRAMMAR TOKENS LOGITS N_ROUNDS\n", arguments[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model * model = llama_model_load_from_file(arguments[1], params);
    if (!model) {
        std::fprintf(stderr, "%s cannot be loaded\n", arguments[1]);
        return 1;
    }
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const std::vector<char> text = read_numbers<char>(arguments[2]);
    const std::vector<llama_token> tokens = read_numbers<llama_token>(arguments[3]);
    const std::vector<float> logits = read_numbers<float>(arguments[4]);
    const size_t n_rounds = std::strtoull(arguments[5], nullptr, 10);
    if (tokens.empty() || logits.size() != (size_t) llama_vocab_n_tokens(vocab)) {
        std::fprintf(stderr, "no tokens, or not as many logits as the vocabulary has\n");
        return 1;
    }

    std::vector<llama_token_data> candidates(logits.size());
    std::printf("{\"nanoseconds\": [");
    for (size_t round = 0; round < n_rounds; round++) {
        llama_sampler * grammar =
            llama_sampler_init_grammar(vocab, std::string(text.begin(), text.end()).c_str(), "root");
        if (!grammar) {
            std::fprintf(stderr, "libllama cannot read the grammar\n");
            return 1;
        }
        Clock::duration spent{};
        for (llama_token token : tokens) {
            const Clock::time_point began = Clock::now();
            llama_token_data_array array = filled(candidates, logits.data());
            llama_sampler_apply(grammar, &array);
            spent += Clock::now() - began;
            if (!std::isfinite(candidates[token].logit)) {
                std::fprintf(stderr, "libllama does not allow token %d\n", token);
                return 1;
            }
            llama_sampler_accept(grammar, token);
        }
        std::printf("%s%.0f", round ? ", " : "", mean(spent, tokens.size()));
        llama_sampler_free(grammar);
    }
    std::printf("]}\n");
    llama_model_free(model);
    return 0;
}
