"""What the tests of several commands share: one artifact, and factories of small networks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

NETS = """
from torch import nn
def plain():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    net.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (1, 1, 1)}
    return net
def nan():
    net = plain()
    net[0].weight.data.fill_(float("nan"))
    return net
def broken():
    raise OSError("no network")
"""


@pytest.fixture(scope="session")
def demo() -> str:
    """The id of the demo's model."""
    return "ttmpd.demo:demo_model"


@pytest.fixture(scope="session")
def quick() -> tuple[str, ...]:
    """Options of `compress` that make a run short."""
    return ("--num-samples", "60", "--batch-size", "16", "--steps", "4", "--device", "cpu", "--set", "distill.views=1",
            "--no-lossless")  # fmt: skip


@pytest.fixture(scope="session")
def made(
    data: Path, demo: str, quick: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Result]
) -> tuple[Path, Result]:
    """One artifact, and what was printed while it was made."""
    folder = tmp_path_factory.mktemp("made") / "out"
    return folder, run("compress", "--model", demo, "--data", data, "--speedup", 1.3, "--output", folder, *quick)


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the factories `plain`, `nan` and `broken`."""
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path
