"""docs/architecture.md describes the code as it is: its file table, its paths and the identifiers that it names."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from support.doc_pages import DOCS
from support.paths import ROOT

sys.path.append(str(ROOT))

from scripts import file_table

PAGE = (DOCS / "architecture.md").read_text()
FOLDERS = ("erllama", "engine", "cache", "llama_ffi")


def sources(suffix: str) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob(f"*{suffix}"))]


@cache
def defined_names() -> frozenset[str]:
    """The names that the sources define: modules, classes, functions, arguments, variables and attributes."""
    names = {"erllama", "_binding", *FOLDERS}  # `_binding` is compiled
    for path in sources(".py"):
        names |= {path.stem, *path.relative_to(ROOT).parts[:-1]}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                names.add(node.value)  # names of tiers, of models' families and of options
    for suffix in (".h", ".cpp"):
        for path in sources(suffix):
            names |= set(re.findall(r"\w+", path.read_text()))
    return frozenset(names)


@cache
def members(owner: str) -> frozenset[str]:
    """The names that the bodies of all classes of one name hold, and those that their methods set on `self`."""
    found: set[str] = set()
    for node in classes().get(owner, []):
        for child in ast.walk(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(child.name)
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                found.add(child.attr)
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                found.add(child.target.id)
        found |= {name for base in node.bases if isinstance(base, ast.Name) for name in members(base.id)}
    return frozenset(found)


@cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """The classes that the sources define, by name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def unknown_names(text: str) -> list[str]:
    """The identifiers in backticks that no source defines, and the paths in backticks that do not exist."""
    return [span for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text) if not is_known(span)]


@cache
def file_names() -> frozenset[str]:
    return frozenset(path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))


def is_known(span: str) -> bool:
    """Whether a path exists, or an identifier is defined; True for spans that are neither, such as commands."""
    if re.fullmatch(r"\w[\w.-]*/[\w./-]*", span):
        return (ROOT / span).exists()
    if re.fullmatch(r"\w+\.(py|h|cpp|toml|md)", span):
        return (ROOT / span).exists() or span in file_names()
    match = re.fullmatch(r"([A-Za-z_][\w.]*)(?:\(.*\)|=.*)?", span)
    if match is None:
        return True
    *owners, name = match[1].split(".")
    if not {name, *owners} <= defined_names():
        return False
    return not owners or owners[-1][0].islower() or name in members(owners[-1])


def test_the_file_table_is_the_opening_lines_of_the_files() -> None:
    assert file_table.table_of_page(PAGE) == file_table.file_table(), (
        "run `python -m scripts.file_table --write`, which brings docs/architecture.md up to date"
    )


def test_every_module_has_a_row() -> None:
    table = file_table.table_of_page(PAGE)
    for path in sources(".py"):
        folder = path.parent.relative_to(ROOT)
        section = table.split(f"| **`{folder}/`** |")[1].split("| **")[0]
        assert path.name == "__init__.py" or f"| `{path.name}` |" in section, path


def test_identifiers_and_paths_of_the_page_exist() -> None:
    assert unknown_names(PAGE) == []


@pytest.mark.parametrize("span", ["Chat", "Scheduler.no_such_method", "engine/no_such_file.py", "no_such_file.py"])
def test_an_identifier_or_path_that_does_not_exist_is_found(span: str) -> None:
    assert unknown_names(f"The `{span}` of a model.") == [span]


def test_identifiers_and_paths_that_exist_are_accepted() -> None:
    text = "`Scheduler`, `Model.complete`, `Cache.save()`, `max_tokens=5`, `engine/kv/prefix_cache.py`"
    assert unknown_names(text) == []
