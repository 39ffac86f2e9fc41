"""The models of a server: which there are, their names, when they are loaded and unloaded, and their memory.

`ModelPool` is what the rest of the server uses. Imports run one way: pool -> lifecycle, description -> room ->
configured, memory -> entry, served.
"""

from __future__ import annotations

from erllama.server.models.configured import ConfiguredModel
from erllama.server.models.entry import ModelEntry
from erllama.server.models.pool import ModelPool
from erllama.server.models.served import ServedModel

__all__ = ["ConfiguredModel", "ModelEntry", "ModelPool", "ServedModel"]
