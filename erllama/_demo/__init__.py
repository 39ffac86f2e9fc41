"""The demonstration that `erllama demo` runs, and the small model in the package."""
