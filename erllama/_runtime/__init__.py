"""Interpreter services: lazy imports, exit handlers, locks, logging, printing, child processes.

Every layer but `llama_ffi` may import this package. It imports no other module of the library.
"""
