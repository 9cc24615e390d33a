"""How sure answers are and how often they are right: calibration error, and the temperature that makes it small."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ttmpd.errors import InvalidValueError

N_BINS = 15
"""Bins of the calibration error."""

_LOWEST, _HIGHEST = -5.0, 5.0  # of the logarithm of a temperature


def calibration_sums(confidence: Tensor, right: Tensor) -> Tensor:
    """(3, N_BINS) float64: samples, their summed confidence, and how many are right, by bins of equal width.

    Sums of several batches may be added, see :func:`expected_calibration_error`.

    Args:
        confidence: (N,) probability of the answer.
        right: (N,) whether it is right.
    """
    sure, right = confidence.detach().cpu().double(), right.cpu()  # some devices know no double precision
    index = (sure * N_BINS).ceil().long().clamp(1, N_BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
    sums = torch.zeros(3, N_BINS, dtype=torch.float64)
    for row, values in enumerate((torch.ones_like(sure), sure, right.to(sure.dtype))):
        sums[row].index_add_(0, index, values)
    return sums


def expected_calibration_error(sums: Tensor) -> float:
    """Expected calibration error of :func:`calibration_sums`; 0 without samples."""
    return float((sums[1] - sums[2]).abs().sum() / sums[0].sum().clamp_min(1))


def calibration_error(logits: Tensor, classes: Tensor) -> float:
    """Expected calibration error over 15 bins: how far confidence is from the share of right answers.

    Args:
        logits: (N, n_classes).
        classes: (N,) the right ones.

    Example:
        >>> round(calibration_error(torch.tensor([[0.0, 2.0]] * 4), torch.tensor([1, 1, 1, 0])), 3)
        0.131
    """
    confidence, answers = logits.detach().cpu().double().softmax(-1).max(-1)
    return expected_calibration_error(calibration_sums(confidence, answers == classes.cpu()))


def fit_temperature(logits: Tensor, classes: Tensor) -> float:
    """The temperature T that makes ``logits / T`` likeliest; answers stay the same, only how sure they are changes.

    In 1/T the negative log-likelihood is convex, so its slope is followed to zero by halving an interval of log T; no
    learning rate. A share of 1 / (N + 2) of every target is spread over the classes (as Platt, 1999, does): where all
    answers are right the likeliest T would be zero.

    Args:
        logits: (N, n_classes) on samples that the classifier was not trained on.
        classes: (N,) the right ones.

    Raises:
        InvalidValueError: there are no samples.

    Source: Guo et al., 2017 (arXiv 1706.04599), section 4.2.
    """
    if not len(logits):
        raise InvalidValueError("a temperature must be fitted on samples, but got none; give more")
    z = logits.detach().cpu().double()
    spread = 1 / (len(z) + 2)
    targets = F.one_hot(classes.cpu(), z.shape[1]) * (1 - spread) + spread / z.shape[1]
    goal = float((targets * z).sum(1).mean())
    low, high = _LOWEST, _HIGHEST
    for _ in range(50):
        middle = (low + high) / 2
        slope = float(((z * math.exp(-middle)).softmax(1) * z).sum(1).mean()) - goal  # by 1/T; it falls as T grows
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp((low + high) / 2)
