"""The command `erllama`: models and caches from a terminal or a script.

The command uses the public library, and no other module imports it. `main` is the
entry point. Each subcommand has a module; `cache`, `chat` and `doctor` have folders.
"""
