"""Writes the file table of docs/architecture.md from the opening lines of the modules.

`python -m scripts.file_table` prints the table; with `--write`, it replaces the text between the two markers of the
page. tests/docs/test_architecture.py compares the page with the modules.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- file table: written by `python -m scripts.file_table --write` -->\n"
END = "<!-- end of the file table -->\n"
PACKAGES = ("erllama", "engine", "cache", "llama_ffi")
SOURCE = re.compile(r"\w+\.(?:py|h|cpp)")  # not LICENSE.llama.cpp, which a build puts into the same folder


def first_line(path: Path) -> str:
    """Return what a module owns: the first line of its docstring, or the first sentence of a C++ file's comment.

    Raises:
        ValueError: the file does not begin with a docstring or a comment.
    """
    text = path.read_text()
    if path.suffix == ".py":
        found = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        comment = re.match(r"(?:/\*.*?\*/|(?://[^\n]*\n)+)", text, re.DOTALL)
        words = re.sub(r"^\s*(?://|/\*|\*/|\*)|\*/\s*$", "", comment[0], flags=re.MULTILINE) if comment else ""
        found = re.match(r"(?:[^.]|\.(?=\w))*", " ".join(words.split()))[0]  # type: ignore[index]
    if not found:
        raise ValueError(f"{path.relative_to(ROOT)} does not begin with a line that states what it owns")
    return found.strip().removesuffix(".")


def folders(package: Path) -> Iterator[Path]:
    """Yield the folders of a package that hold modules, each before its subfolders."""
    yield package
    for path in sorted(package.iterdir()):
        if (path / "__init__.py").is_file():
            yield from folders(path)


def files(folder: Path) -> list[Path]:
    """Return the sources of one folder, except its `__init__.py`, in order of their names."""
    sources = [path for path in folder.iterdir() if SOURCE.fullmatch(path.name) and path.name != "__init__.py"]
    return sorted(sources, key=lambda path: path.name)


def file_table() -> str:
    """Return the Markdown of the table: one section per package, one bold row per folder, one row per file."""
    lines = [""]
    for package in PACKAGES:
        lines += [f"### `{package}/`", "", "| File | Owns |", "|---|---|"]
        for folder in folders(ROOT / package):
            lines.append(_row(f"**`{folder.relative_to(ROOT)}/`**", folder / "__init__.py"))
            lines += [_row(f"`{path.name}`", path) for path in files(folder)]
        lines.append("")
    return "\n".join(lines) + "\n"


def _row(name: str, path: Path) -> str:
    return f"| {name} | {first_line(path).replace('|', chr(92) + '|')} |"


def table_of_page(page: str) -> str:
    """Return the text between the markers of the page.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = page.find(BEGIN), page.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"{PAGE.relative_to(ROOT)} lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return page[begin + len(BEGIN) : end]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.file_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="Write the table to docs/architecture.md.")
    table = file_table()
    if not parser.parse_args().write:
        print(table)
        return
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + table_of_page(page) + END, BEGIN + table + END))


if __name__ == "__main__":
    main()
