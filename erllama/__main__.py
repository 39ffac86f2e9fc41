"""Entry point of `python -m erllama` and of the command `erllama`."""

from __future__ import annotations

import sys

from erllama.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
