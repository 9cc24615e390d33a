"""The scripts of ``examples`` run, are short, and print what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PRINTED = {
    "compare_targets": ("units hold", "would remove"),
    "compress_images": ("target met: True", "agreement with the adapted model", "predictions: (2, 10)"),
    "your_own_model": ("removed: ['",),
}


def test_every_example_is_named_here():
    assert sorted(PRINTED) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_example(name, quick_timing, capsys):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    for words in PRINTED[name]:
        assert words in printed
