"""Tiers: places that store payloads.

`tier` is the interface. `ram_tier` keeps payloads in the memory of this process. `file_tier` stores blocks as files
in a directory, with `sqlite_index` as the source of truth, and `read_only` reads such a directory without
writing. A file tier opens its directory through `open_directory` (`directory` and `sqlite_index`, with the tables
of `index_schema` and `text_table`), and `reconciler` makes the index fit the files, for the names that `watch`
reports to `changed_files`. Imports `texts` and `blocks`.
"""
