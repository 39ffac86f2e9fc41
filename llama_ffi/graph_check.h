/* Checks whether ggml can compute a graph. Otherwise an operation could fail an assertion during a decode. */
#pragma once

#include <string>

struct llama_context;

/* Builds the graphs of a prompt's and of a reply's decode, and checks each operation without computing it.
   Returns the reason why an operation cannot be computed, or an empty text. Throws what building a graph throws. */
std::string graph_problem(llama_context *context);
