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


MAPPINGS = {
    "choose_methods": "verb -> method, as many as are asked for",
    "named": "name of a setting -> value, whatever the user passes",
}
"""Functions that return a mapping whose keys are data, not fields."""


def untyped_readers(texts: dict[str, str]) -> dict[str, set[str]]:
    """Function that returns ``dict[str, Any]`` -> the files, but for its own, that read a key of what it returned."""
    trees = {name: ast.parse(text) for name, text in texts.items()}
    makers: dict[str, str] = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns and "dict[str, Any]" in ast.unparse(node.returns):
                makers |= {} if node.name in MAPPINGS else {node.name: name}
    readers: dict[str, set[str]] = {}
    for name, tree in trees.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for made in keys_read(function, set(makers)):
                    if makers[made] != name:
                        readers.setdefault(made, set()).add(name)
    return readers


def keys_read(function: ast.FunctionDef, makers: set[str]) -> set[str]:
    """The makers of whose results this function reads a key that stands in the code."""

    def maker(node: ast.expr) -> str:
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            return called if called in makers else ""
        return held.get(node.id, "") if isinstance(node, ast.Name) else ""

    held: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and (made := maker(node.value)):
            held |= {target.id: made for target in node.targets if isinstance(target, ast.Name)}
    read = set()
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            read.add(maker(node.value))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            read.add(maker(node.func.value))
    return read - {""}


def test_a_dict_without_types_that_another_file_reads_is_seen():
    made = "def state() -> dict[str, Any]: ...\ndef own():\n    return state()['a']\n"
    assert untyped_readers({"a.py": made}) == {}
    assert untyped_readers({"a.py": made, "b.py": "def f(s):\n    return s.state()['a']\n"}) == {"state": {"b.py"}}
    assert untyped_readers({"a.py": made, "b.py": "def f():\n    x = state()\n    x.get('a')\n"}) == {"state": {"b.py"}}
    assert untyped_readers({"a.py": made, "b.py": "def f():\n    return dump(state())\n"}) == {}


def test_no_dict_without_types_is_read_by_another_file():
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in python_files("src")}
    del texts["src/ttmpd/models/hub.py"]  # reads those of transformers' processors
    assert untyped_readers(texts) == {}
