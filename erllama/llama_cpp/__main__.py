"""Prints the directory for PYTHONPATH in which `llama_cpp` is erllama's drop-in: `python -m erllama.llama_cpp`."""

from __future__ import annotations

import sys
from pathlib import Path

from erllama.llama_cpp import path

if __name__ == "__main__":
    sys.stdout.write(f"{Path(path.__path__[0])}\n")
