"""Backends: libllama (`llama` and the modules named after it) and a stub without a model.

A custom backend needs neither. `llama_library` is the only module that imports the binding. Imports run from
`llama` to `llama_file`, `llama_options`, `file_identity` and `gguf_parts`. Of the rest of the engine, the package
imports the protocols in `engine.backend` and `engine.embedding`, and `engine.processors`.
"""
