"""What all tests share: one thread, and tiny models that are built once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from ttmpd import cli, savings, timing
from ttmpd.demo import demo_data
from ttmpd.records import Samples, Unit
from ttmpd.specimens import tiny_model, tiny_samples, tiny_units


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def net() -> nn.Module:
    return tiny_model()


@pytest.fixture
def samples() -> Samples:
    return tiny_samples()


@pytest.fixture
def units(net: nn.Module) -> tuple[Unit, ...]:
    return tiny_units(net)


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds of timing, and no least duration."""
    true = timing.interleaved

    def interleaved(candidates: Any, **settings: Any) -> timing.Rounds:
        return true(candidates, **settings | {"rounds": 5, "warmup": 1, "min_seconds": 0.0})

    monkeypatch.setattr(savings, "interleaved", interleaved)
    monkeypatch.setattr(timing, "interleaved", interleaved)


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """The command line in this process; what is no exit is raised."""

    def run(*arguments: object) -> Result:
        found = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return found

    return run


@pytest.fixture(scope="session")
def said() -> Callable[[Result], str]:
    """Everything that was printed, without the line breaks and frames that depend on the width."""
    return lambda found: " ".join((found.stdout + found.stderr).replace("│", " ").split())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of the place of use with their labels, 150 of them."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    found = demo_data()
    np.savez(path, x=found.x[:150], y=found.y[:150])
    return path
