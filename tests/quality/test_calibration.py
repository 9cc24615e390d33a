"""Calibration error and temperature against values worked out by hand or by another route."""

import math

import pytest
import torch
from torch.nn import functional as F

from ttmpd.errors import InvalidValueError
from ttmpd.quality.calibration import calibration_error, calibration_sums, expected_calibration_error, fit_temperature


def noisy(n: int, sharpness: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a classifier that is right as often as it says, times ``sharpness``; and the classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, generator=generator)
    classes = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
    return sharpness * logits, classes


def test_error_of_two_bins_by_hand():
    # Three answers at 0.9 of which two are right, one at 0.6 that is wrong: (|2.7 - 2| + |0.6 - 0|) / 4.
    sure, right = torch.tensor([0.9, 0.9, 0.9, 0.6]), torch.tensor([True, True, False, False])
    assert expected_calibration_error(calibration_sums(sure, right)) == pytest.approx(0.325)
    halves = calibration_sums(sure[:2], right[:2]) + calibration_sums(sure[2:], right[2:])
    assert expected_calibration_error(halves) == pytest.approx(0.325)
    assert expected_calibration_error(calibration_sums(sure[:0], right[:0])) == 0


def test_perfect_answers_have_no_error_and_sure_wrong_ones_all_of_it():
    logits = torch.tensor([[20.0, 0.0]] * 4)
    assert calibration_error(logits, torch.zeros(4, dtype=torch.long)) < 1e-6
    assert calibration_error(logits, torch.ones(4, dtype=torch.long)) > 1 - 1e-6


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 4.0])
def test_temperature_undoes_what_made_answers_too_sure_or_too_unsure(sharpness):
    logits, classes = noisy(4000, sharpness)
    temperature = fit_temperature(logits, classes)
    assert temperature == pytest.approx(sharpness, rel=0.08)
    if sharpness != 1:
        assert calibration_error(logits / temperature, classes) < 0.5 * calibration_error(logits, classes)


def test_temperature_is_the_likeliest():
    logits, classes = noisy(300, 3.0)
    found = fit_temperature(logits, classes)

    def loss(temperature: float) -> float:
        # The same smoothing of 1 / (N + 2) as the fit.
        return float(F.cross_entropy(logits.double() / temperature, classes, label_smoothing=1 / 302))

    assert all(loss(found) < loss(found * factor) for factor in (0.98, 1.02))


def test_temperature_stays_finite_where_all_answers_are_right_and_needs_samples():
    logits = torch.eye(3).repeat(5, 1) * 2
    # 1 / 17 of each target is spread over three classes: e^(2/T) / (e^(2/T) + 2) = 1 - 2 / 51.
    assert fit_temperature(logits, logits.argmax(-1)) == pytest.approx(2 / math.log(49))
    assert math.isfinite(fit_temperature(logits[:1], logits[:1].argmax(-1)))
    assert math.isfinite(fit_temperature(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(InvalidValueError, match="but got none"):
        fit_temperature(logits[:0], logits[:0].argmax(-1))
