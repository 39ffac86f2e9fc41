"""`erllama doctor`: checks the build and the cache directories, and says how to repair them."""
