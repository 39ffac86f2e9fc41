"""The cache on disk of what other programs load: the drop-in for llama-cpp-python, and the plugin of llm."""

from __future__ import annotations

import os
import threading

from erllama.cache import Cache

_cache_lock = threading.Lock()
_default_cache: Cache | None = None


def default_cache() -> Cache:
    """Return the cache of this process in memory and in the user's cache directory.

    The variable ERLLAMA_CACHE_DIR names another directory.
    """
    global _default_cache
    with _cache_lock:
        if _default_cache is None or _default_cache.closed:
            _default_cache = Cache(disk=os.environ.get("ERLLAMA_CACHE_DIR") or True)
        return _default_cache
