"""The module `llama_cpp` of programs with this directory on PYTHONPATH: erllama's drop-in."""

__erllama__ = True

from erllama.llama_cpp import install

install()
