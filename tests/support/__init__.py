"""Shared by several test modules: models and backends, child processes, files to damage, examples of every family.

`chat` holds templates and tool calls, `storage` blocks and the processes that share a cache, `gguf` model files to
edit, and `faulty` tiers and backends with one fault each.
"""
