"""Tests of llama-cpp-python's high-level interface, from its own sources, against `erllama.llama_cpp`."""
