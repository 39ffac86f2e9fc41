"""Where payloads are stored.

`tier` is the interface. `ram_tier` keeps payloads in the memory of this process. `file_tier` stores
blocks as files in a directory, with `index` (SQLite) as the source of truth; `read_only` reads such a
directory without writing. `directory`, `watch` and `text_table` serve the file tiers. Does not import
the pipeline.
"""
