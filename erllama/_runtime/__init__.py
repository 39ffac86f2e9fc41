"""What the library needs of the interpreter: lazy imports, exit handlers, signals, logging.

Imports nothing else of the library.
"""
