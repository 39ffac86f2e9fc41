"""A plugin for pytest: llama.cpp's tests do not start all their models first, which downloads them.

The stand-ins need no download. The runner loads it with `-p`.
"""

from __future__ import annotations

import importlib


def pytest_collection_finish() -> None:
    """Replace the function that starts all models. The tests' own modules are imported by now."""
    importlib.import_module("utils").ServerPreset.load_all = staticmethod(lambda: None)
