"""The tests keep their conventions: short names, no imports between test modules, and one folder per topic."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.paths import TESTS

MODULES = sorted(TESTS.rglob("*.py"))
TEST_MODULES = [path for path in MODULES if path.name.startswith("test_")]
LONGEST_NAME = 70


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, relative imports with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", TEST_MODULES, ids=lambda path: path.stem)
def test_names_of_tests_have_at_most_70_characters(path: Path) -> None:
    names = [function.name for function in functions(path) if function.name.startswith("test_")]
    assert names, f"{path.name} has no test"
    assert [name for name in names if len(name) > LONGEST_NAME] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(path.relative_to(TESTS).parts))
def test_no_module_of_the_tests_imports_a_test_module(path: Path) -> None:
    test_modules = {test.stem for test in TEST_MODULES}
    for module in imported_modules(path):
        assert not module.startswith("."), f"{module}: import helpers from `support`"
        ours = not module.startswith(("erllama.", "examples."))
        assert not (ours and test_modules.intersection(module.split("."))), (
            f"{path.name} imports {module}; move what both need to tests/support"
        )


def test_test_modules_lie_in_folders_and_have_different_names() -> None:
    assert [path.name for path in TEST_MODULES if path.parent == TESTS] == []
    names = [path.name for path in TEST_MODULES]
    assert sorted(names) == sorted(set(names))


def test_every_module_and_fixture_of_the_tests_has_a_docstring() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
    for function in functions(TESTS / "conftest.py"):
        assert ast.get_docstring(function), function.name
