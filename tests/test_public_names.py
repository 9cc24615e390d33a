"""What ``import ttmpd`` offers: one list of names, the imports for type checkers, and the examples."""

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ttmpd

FUNCTIONS = sorted(name for name in ttmpd.__all__ if inspect.isfunction(getattr(ttmpd, name)))
"""What users call."""


def imports_of(modules: dict[str, str]) -> list[str]:
    """The lines of the block for type checkers."""
    rows = sorted((module, name) for name, module in modules.items() if name != "from_pretrained")
    return [f"    from ttmpd.{module} import {name} as {name}" for module, name in rows]


def test_type_checkers_see_the_same_names():
    written = [line for line in Path(ttmpd.__file__).read_text().splitlines() if re.match(r"    from ttmpd\.", line)]
    expected = imports_of(ttmpd._MODULES)
    assert written == expected, "below `if TYPE_CHECKING:` write:\n" + "\n".join(expected)


def test_every_name_is_there():
    for name in ttmpd.__all__:
        assert getattr(ttmpd, name) is not None
    assert set(dir(ttmpd)) == {*ttmpd.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ttmpd.nothing  # noqa: B018


def test_importing_loads_no_torch():
    code = "import sys, ttmpd; dir(ttmpd); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the artifact ``fast/``, from which the examples read."""
    folder = tmp_path_factory.mktemp("examples")
    ttmpd.adapt_to(
        "ttmpd.testing.tiny_models:tiny_model", torch.rand(40, 3, 8, 8), adapt="none", output=folder / "fast"
    )
    return folder


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example_that_runs(name, place, quick_timing, monkeypatch):
    monkeypatch.chdir(place)
    function = getattr(ttmpd, name)
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(vars(ttmpd), ttmpd=ttmpd))
    examples = [example for test in tests for example in test.examples]
    assert any(not example.options.get(doctest.SKIP) for example in examples), f"ttmpd.{name} has no example that runs"
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in tests:
        test.globs.update(vars(sys.modules[function.__module__]))
        runner.run(test)
    assert runner.failures == 0
