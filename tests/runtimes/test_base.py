"""Whole models are timed through a runtime; the checks of runtimes find what is wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.latency.exits import check_runtime
from ttmpd.latency.lossless import unchanged
from ttmpd.latency.table import UnitLatency, compare, runtime_ratio
from ttmpd.latency.timing import time_models
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.settings import Settings
from ttmpd.runtimes.base import Runtime
from ttmpd.runtimes.eager import Eager
from ttmpd.testing import runtimes as checks
from ttmpd.testing.tiny_models import tiny_model, tiny_samples

PREPARED: list[nn.Module] = []


class Recording(Runtime):
    """Notes which modules it was asked to run."""

    source = "none"

    @property
    def version(self) -> str:
        return "7.1"

    def prepare(self, module: nn.Module, batch: Tensor) -> Callable[[Tensor], Tensor]:
        PREPARED.append(module)
        return module


class Wrong(Recording):
    """Answers something else, trains what it was given, and has no version."""

    @property
    def version(self) -> str:
        return ""

    def prepare(self, module: nn.Module, batch: Tensor) -> Callable[[Tensor], Tensor]:
        module.register_forward_hook(lambda *_: None)
        batch += 1
        return lambda inputs: module(inputs) + 1


@pytest.fixture(autouse=True)
def _forget() -> None:
    PREPARED.clear()


@pytest.mark.parametrize("check", checks.CHECKS)
def test_the_checks_find_a_wrong_runtime(check):
    with pytest.raises(AssertionError):
        check(Wrong())


@pytest.mark.parametrize("check", checks.CHECKS)
def test_the_checks_pass_a_right_runtime(check):
    check(Recording())


def test_every_timing_of_whole_models_goes_through_the_runtime(quick_timing):
    model, other, batch = tiny_model(), tiny_model(n_blocks=2), tiny_samples(2).batch(slice(None))
    time_models({"a": model, "b": other}, batch, rounds=1, runtime=Recording())
    compare(model, other, batch, runtime=Recording())
    unchanged(model, batch, runtime=Recording())
    modules = list(PREPARED)
    assert modules == [model, other, model, other, model]


def test_eager_is_not_timed_against_itself():
    assert runtime_ratio(nn.Identity(), torch.zeros(1), Eager()) == 1.0
    assert UnitLatency("a", 4.0, {"linear": 1.0}, {"2": 3.0}).times(0.5) == UnitLatency(
        "a", 2.0, {"linear": 0.5}, {"2": 1.5}
    )


def test_units_are_scaled_by_the_ratio_of_both_runtimes(monkeypatch, quick_timing):
    batch = tiny_samples(2).batch(slice(None))
    assert runtime_ratio(tiny_model(), batch, Recording()) > 0
    assert len(PREPARED) == 1


def test_a_run_names_its_runtime_and_plans_by_it(quick_timing):
    result = compress(tiny_model(), tiny_samples(12).inputs, speedup=1.01, runtime=Recording(), batch_size=4)
    assert (result.report.runtime.name, result.report.runtime.version) == (Recording().name, "7.1")
    assert len(PREPARED) >= 4  # original and lossless, a try, the last measurement


def test_exits_are_timed_in_eager_pytorch_alone():
    check_runtime(Eager())
    with pytest.raises(UnsupportedError, match="eager PyTorch"):
        check_runtime(Recording())


def test_a_runtime_is_a_setting_by_name_or_instance():
    assert Settings().to_dict()["runtime"] == {"name": "eager"}
    with pytest.raises(InvalidValueError, match="a setting must be one of"):
        compress(tiny_model(), tiny_samples(4).inputs, speedup=2, runtimes="eager")
