"""`ttmpd demo`: what it prints, which is also what the README shows."""

import re
from pathlib import Path

import pytest

import ttmpd
from ttmpd.cli.commands import _reporting
from ttmpd.demo import run as demo_run

README = Path(__file__).resolve().parents[3] / "README.md"


@pytest.fixture(scope="module")
def shown(tmp_path_factory, run):
    """A demo with a few samples and steps of training, and a target that does not depend on how busy the machine is."""
    quick = {"score": "magnitude", "distill": ttmpd.OneTime(steps=2, views=1), "num_samples": 60, "batch_size": 16}

    def compress(model, samples, *, speedup, **settings):
        assert speedup == demo_run.SPEEDUP
        return ttmpd.compress(model, samples, macs=0.7, **quick, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "compress", compress)
        return run("demo", "--output", tmp_path_factory.mktemp("demo") / "out")


def rows(text: str) -> list[str]:
    """The names in the first column of a table, and of the lines around it, without their figures."""
    names = re.findall(r"^│ ([a-z][^│]*?) +│", text, flags=re.M)
    lines = re.findall(r"^([A-Z][a-z ]+):", text, flags=re.M)
    return [re.sub(r"\d+", "N", name) for name in [*names, *lines]]


def test_it_ends_with_the_table_and_the_artifact(shown, said):
    assert shown.exit_code in (0, _reporting.TARGET_MISSED), said(shown)
    assert "agreement with the adapted model" in shown.stdout
    assert "Artifact: " in shown.stdout


def test_the_readme_shows_what_it_prints(shown):
    block = next(part for part in README.read_text(encoding="utf-8").split("```") if "held-out shifted digits" in part)
    assert rows(block) == rows(shown.stdout)
