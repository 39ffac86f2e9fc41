"""Prints the requirements of an extra of pyproject.toml, one per line, for `pip install -r`.

`make` installs the packages of an extra with it. Installing `.[extra]` instead would
compile the binding again.

    python scripts/extra_requirements.py dev
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: dict[str, list[str]], name: str) -> list[str]:
    """Return the requirements of an extra, including those of the extras of erllama that it names.

    Raises:
        SystemExit: there is no extra of that name.
    """
    if name not in extras:
        raise SystemExit(f"extra_requirements: no extra {name!r}; choose one of {', '.join(sorted(extras))}")
    found: list[str] = []
    for requirement in extras[name]:
        nested = re.fullmatch(r"erllama\[([\w,\s-]+)\]", requirement)
        if nested is None:
            found.append(requirement)
            continue
        for extra in nested[1].split(","):
            found += requirements(extras, extra.strip())
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: extra_requirements.py EXTRA")
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    print("\n".join(requirements(project["optional-dependencies"], sys.argv[1])))
