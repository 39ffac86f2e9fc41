"""The demonstration that `erllama demo` runs, and the small model that comes with erllama."""
