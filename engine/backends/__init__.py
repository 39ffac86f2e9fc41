"""Backends: libllama (`erllama.engine.backends.llama`) and the stub. A backend of one's own needs neither."""
