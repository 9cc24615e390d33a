"""Drift is seen where answers change, and as rarely as stated where they do not."""

import pytest
import torch
from torch import Tensor

from ttmpd.errors import InvalidValueError
from ttmpd.serving.drift import Drift


def logits(n: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, 5, generator=generator).exp() * scale  # skewed, as logits are
    values[:, 0] += shift
    return values


def first_move(drift: Drift, stream: Tensor, batch: int = 16) -> int | None:
    """Samples after which data are said to have moved."""
    for number, part in enumerate(stream.split(batch), start=1):
        drift.add(part)
        test = drift.test()
        if test is not None and test.moved:
            return number * batch
    return None


@pytest.mark.parametrize("change", [{"shift": 4.0}, {"shift": -4.0}, {"scale": 0.5}, {"scale": 2.0}])
def test_a_shift_is_seen_within_two_windows(change):
    drift = Drift(logits(100, 0), window=128)
    assert first_move(drift, logits(512, 1)) is None
    seen = first_move(drift, logits(512, 2, **change))
    assert seen is not None
    assert seen <= 256


def test_one_distribution_alarms_as_rarely_as_stated():
    rate, n_tests, n_alarms = 0.05, 0, 0
    for seed in range(150):
        drift = Drift(logits(100, 2 * seed), window=64, false_alarm=rate)
        for part in logits(320, 2 * seed + 1).split(32):
            drift.add(part)
            drift.test()
        n_tests, n_alarms = n_tests + drift.n_tests, n_alarms + drift.n_alarms
    assert n_tests == 150 * 9
    # At most 67 are expected; tests against one reference go together, so twice as many would still be chance.
    assert 0 < n_alarms < 110


def test_one_alarm_is_not_enough():
    drift = Drift(logits(100, 0), window=64)
    drift.add(logits(64, 1, shift=5.0))
    test = drift.test()
    assert test is not None
    assert test.alarm and not test.moved
    drift.add(logits(64, 2))
    test = drift.test()
    assert test is not None
    assert not test.alarm


def test_nothing_is_tested_before_the_window_is_full_and_half_of_it_new():
    drift = Drift(logits(50, 0), window=32)
    drift.add(logits(31, 1))
    assert drift.test() is None
    drift.add(logits(1, 2))
    assert drift.test() is not None
    drift.add(logits(15, 3))
    assert drift.test() is None


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_tiny_reference_never_alarms(n):
    drift = Drift(logits(n, 0), window=16)
    drift.add(logits(64, 1, shift=100.0))
    test = drift.test()
    assert test is not None
    assert not test.alarm


def test_answers_that_are_not_finite_are_left_out():
    drift = Drift(logits(50, 0), window=16)
    broken = logits(16, 1)
    broken[:, 2] = float("nan")
    drift.add(broken)
    assert drift.test() is None


def test_equal_answers_are_no_drift():
    drift = Drift(torch.zeros(50, 3), window=16)
    drift.add(torch.zeros(64, 3))
    test = drift.test()
    assert test is not None
    assert test.statistic == 0


def test_values_out_of_range_are_refused():
    with pytest.raises(InvalidValueError, match="window must be"):
        Drift(logits(10, 0), window=1)
    with pytest.raises(InvalidValueError, match="false_alarm must be"):
        Drift(logits(10, 0), false_alarm=0.9)
