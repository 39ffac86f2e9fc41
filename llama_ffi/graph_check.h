/* Whether ggml can compute a graph: what its operations would otherwise assert in the midst of a decode. */
#pragma once

#include <string>

struct llama_context;

/* Builds the graphs of a prompt's and of a reply's decode, computes nothing, and checks each operation.
   Returns why one cannot be computed, or an empty text. May throw what building a graph throws. */
std::string why_not_computable(llama_context *context);
