"""The command `erllama`: everything that a terminal or a script does with models and caches.

Stands on the public library, and nothing stands on it. `main` is the entry
point; each command is a module of its own.
"""
