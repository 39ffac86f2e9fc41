"""`erllama doctor`: checks the build and the cache directories, and suggests fixes."""
