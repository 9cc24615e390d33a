"""Sizes that keep the code readable: of functions and of files, over the whole tree."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples")
MAX_FUNCTION, P90_FUNCTION, MAX_FILE = 40, 20, 400
STILL_LARGE = {
    "benchmarks/end_to_end.py:run",
}
"""Functions that were larger when the rule came; none is in the package."""


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of the body behind the docstring that are neither blank nor a comment."""
    body = function.body if ast.get_docstring(function) is None else function.body[1:]
    if not body:
        return 0
    text = lines[body[0].lineno - 1 : function.end_lineno]
    return sum(1 for line in text if line.strip() and not line.strip().startswith("#"))


def sizes(text: str) -> list[tuple[str, int]]:
    """Name and code lines of every function in a file's text."""
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lines = text.splitlines()
    return [(function.name, code_lines(function, lines)) for function in functions]


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_code_lines_are_counted_behind_the_docstring():
    text = 'def f():\n    """One.\n\n    Two.\n    """\n    # why\n\n    a = (\n        1\n    )\n    return a\n'
    assert sizes(text) == [("f", 4)]
    assert sizes('def g():\n    """Nothing else."""\n') == [("g", 0)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_too_long(folder):
    long = {
        f"{path.relative_to(ROOT)}:{name}": n
        for path in python_files(folder)
        for name, n in sizes(path.read_text(encoding="utf-8"))
        if n > MAX_FUNCTION
    }
    assert {name: n for name, n in long.items() if name not in STILL_LARGE} == {}


def test_nine_functions_of_ten_are_short():
    counts = sorted(n for path in python_files("src") for _, n in sizes(path.read_text(encoding="utf-8")))
    assert counts[int(0.9 * len(counts))] <= P90_FUNCTION


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_too_long(folder):
    long = {
        str(path.relative_to(ROOT)): n
        for path in python_files(folder)
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE
    }
    assert long == {}
