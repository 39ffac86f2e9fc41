"""The environment variables that say where models are. No other module of `models` reads the environment."""

from __future__ import annotations

import os
from pathlib import Path

# All are listed in docs/models.md, except the last one, which is that of the system.
VARIABLES = (
    "ERLLAMA_MODELS",
    "ERLLAMA_MODEL_CACHE",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HOME",
    "OLLAMA_MODELS",
    "LLAMA_CACHE",
    "XDG_CACHE_HOME",
)


def directories_of(variable: str) -> list[Path]:
    """Return the directories of a variable, which is written as PATH is; none if it is not set."""
    assert variable in VARIABLES
    return [Path(each).expanduser() for each in os.environ.get(variable, "").split(os.pathsep) if each]


def directory_of(variable: str) -> Path | None:
    """Return the directory of a variable; None if it is not set."""
    assert variable in VARIABLES
    chosen = os.environ.get(variable)
    return Path(os.path.expandvars(chosen)).expanduser() if chosen else None


def system_cache() -> Path:
    """Return the user's cache directory as the XDG standard says, which the other programs use on all systems."""
    return directory_of("XDG_CACHE_HOME") or Path.home() / ".cache"
