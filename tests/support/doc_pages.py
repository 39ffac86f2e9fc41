"""The pages of the documentation, and the code blocks, links and tables in them."""

from __future__ import annotations

import re
from typing import NamedTuple

from support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted(DOCS.rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its language, its text, and the line it begins in."""

    language: str
    text: str
    line: int


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page, named from the root; of one language, or of all."""
    text = (ROOT / page).read_text()
    found = [Block(m[1], m[2], text[: m.start(2)].count("\n") + 1) for m in _BLOCK.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return _BLOCK.sub("", (ROOT / page).read_text())


def tables(page: str) -> dict[str, list[list[str]]]:
    """The cells of the rows under each heading of a page, without the tables' own heads."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in prose(page).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        if re.match(r"\|[-:| ]+\|$", line):
            found[heading].pop()  # what was before it is its head
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


# What is run here as a script, with a model in the directory; tests/docs/test_docs.py knows who runs the others.
SCRIPTS = ("adapters", "caching", "conversations", "embeddings", "loading", "operating", "serving", "streaming")
