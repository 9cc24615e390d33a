"""What all tests share: one thread, and tiny models that are built once."""

from typing import Any

import pytest
import torch
from torch import nn

from ttmpd import savings, timing
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
