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
    """A block of code: its language, its text, and its first line in the page."""

    language: str
    text: str
    line: int


def blocks(page: str, language: str | None = None) -> list[Block]:
    """Return the code blocks of a page, given by its path from the root, of one language or of all."""
    text = (ROOT / page).read_text()
    found = [Block(m[1], m[2], text[: m.start(2)].count("\n") + 1) for m in _BLOCK.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def prose(page: str) -> str:
    """Return a page without its code blocks."""
    return _BLOCK.sub("", (ROOT / page).read_text())


def tables(page: str) -> dict[str, list[list[str]]]:
    """Return the cells of all table rows under each heading of a page, without the header rows."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in prose(page).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        if re.match(r"\|[-:| ]+\|$", line):
            found[heading].pop()  # the row before it is the header
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


# Pages that run as scripts with a model in the directory. tests/docs/test_docs.py lists the tests of the others.
SCRIPTS = ("adapters", "caching", "conversations", "embeddings", "loading", "operating", "serving", "streaming")
