"""A directory for PYTHONPATH in which `llama_cpp` is the drop-in; `python -m erllama.llama_cpp` prints it."""
