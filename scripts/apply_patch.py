"""Applies a unified diff to a source tree, exactly: build_llama.sh changes the pinned release of llama.cpp with it.

Needs only Python, because `patch` is missing on some machines. There is no tolerance: a line that differs, or a
part that fits no place or several places, is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path


def parts(patch: str) -> Iterator[tuple[str, str, str]]:
    """Yield the file, the old text and the new text of each part of a diff. Files have a prefix such as "b/"."""
    file, old, new = "", "", ""
    inside = False
    for line in patch.splitlines(keepends=True):
        if line.startswith(("--- ", "+++ ", "@@ ")):
            if inside:
                yield file, old, new
            old, new, inside = "", "", line.startswith("@@ ")
            if line.startswith("+++ "):
                file = line[4:].strip().partition("/")[2]
        elif inside:
            old += line[1:] if line[0] in " -" else ""
            new += line[1:] if line[0] in " +" else ""
    if inside:
        yield file, old, new


def apply(patch: Path, tree: Path) -> None:
    """Apply a diff to a tree.

    Raises:
        SystemExit: a part does not fit; the tree may be partly changed.
    """
    for file, old, new in parts(patch.read_text()):
        path = tree / file
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{patch.name} does not fit {path}: these lines occur {text.count(old)} times:\n{old}")
        path.write_text(text.replace(old, new))


if __name__ == "__main__":
    apply(Path(sys.argv[1]), Path(sys.argv[2]))
