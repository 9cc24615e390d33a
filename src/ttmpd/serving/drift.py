"""Drift of a model's predictions away from a reference: rank tests on a moving window, with known false alarms."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ttmpd.method import check_range
from ttmpd.tasks.base import Task
from ttmpd.tasks.classification import Classification

N_DIRECTIONS = 4
"""Random directions along which outputs are compared, beside what their task measures."""
CLASSES = Classification()
IN_A_ROW = 2
"""Windows in a row that must alarm before data are said to have moved: a short burst does not count."""


@dataclass(frozen=True, slots=True)
class DriftTest:
    """One look at the window.

    Args:
        statistic: the largest absolute z-value of all signals.
        threshold: what it exceeds by chance in a share of ``false_alarm`` of the tests.
        signal: the name of the signal with that z-value.
        moved: whether this and the test before both exceed the threshold.
    """

    statistic: float
    threshold: float
    signal: str
    moved: bool

    @property
    def alarm(self) -> bool:
        """True when the statistic exceeds the threshold."""
        return self.statistic > self.threshold


class Drift:
    """Compares a model's last predictions with a reference of the same model's predictions.

    Every prediction becomes some signals: those that its task states (of classes the entropy and the log sum exp of
    the logits), and its standardised values along four random directions, as they are (where the mean moved) and as
    distances from the reference's median (where the spread changed). Each signal is compared by the Mann-Whitney rank
    test, whose distribution does not depend on that of the signal.

    False alarms: while window and reference are independent draws from one distribution, a test alarms with a
    probability of at most ``false_alarm`` (Bonferroni over the signals, normal approximation of the rank sum); data are
    said to have moved after two alarms in a row, which is rarer. Samples that come sorted or in scenes are not
    independent: use a larger window for them.

    Args:
        reference: (n, values) predictions for samples that the model was not fitted on, or (n, rows, values) where a
            sample has several, such as pixels, whose signals are averaged; with fewer than seven samples, nothing can
            exceed the threshold at the defaults.
        task: states what is measured of a prediction.
        window: samples that are compared; a test is made whenever half of them are new.
        false_alarm: probability of a false alarm of one test.
        seed: draws the directions.

    Raises:
        InvalidValueError: an argument is out of range.

    Example:
        >>> logits = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> drift = Drift(logits[:200], window=100)
        >>> drift.add(logits[200:])
        >>> drift.test().alarm
        False

    Source: Mann and Whitney, 1947; rank tests on network outputs as in Rabanser et al., 2019 (arXiv 1810.11953), which
    takes Kolmogorov-Smirnov's.
    """

    def __init__(
        self,
        reference: Tensor,
        task: Task = CLASSES,
        *,
        window: int = 256,
        false_alarm: float = 1e-4,
        seed: int = 0,
    ) -> None:
        check_range("window", window, 8)
        check_range("false_alarm", false_alarm, 1e-12, 0.5)
        self.task, reference = task, _finite(reference)
        self._fit(reference.flatten(0, -2), torch.Generator().manual_seed(seed))
        names = list(task.signals(reference.flatten(0, -2)))
        self.names = (*names, *(f"{kind} along {i}" for kind in ("outputs", "spread") for i in range(N_DIRECTIONS)))
        self._reference = self.signals(reference).T.contiguous().sort(-1).values
        self._window = torch.empty(0, len(self.names))
        self._size, self._n_new, self._n_in_a_row = window, 0, 0
        self.threshold = NormalDist().inv_cdf(1 - false_alarm / (2 * len(self.names)))
        self.n_tests = self.n_alarms = 0

    def _fit(self, rows: Tensor, generator: torch.Generator) -> None:
        """Scale, directions and center of the reference's rows, (m, values)."""
        directions = torch.randn(rows.shape[-1], N_DIRECTIONS, generator=generator)
        self._directions = directions / directions.norm(dim=0).clamp_min(1e-12)
        self._mean = rows.mean(0) if len(rows) else torch.zeros(rows.shape[-1])
        self._scale = (rows.std(0) if len(rows) > 1 else torch.ones(rows.shape[-1])).clamp_min(1e-6)
        self._center = self._along(rows).median(0).values if len(rows) else torch.zeros(N_DIRECTIONS)

    def _along(self, rows: Tensor) -> Tensor:
        along: Tensor = ((rows - self._mean) / self._scale) @ self._directions
        return along

    def signals(self, outputs: Tensor) -> Tensor:
        """(n, n_signals) of finite predictions, (n, values) or (n, rows, values)."""
        rows = outputs.flatten(0, -2)
        along = self._along(rows)
        measured = [signal[:, None] for signal in self.task.signals(rows).values()]
        signals = torch.cat((*measured, along, (along - self._center).abs()), -1)
        return signals if outputs.dim() == 2 else signals.view(*outputs.shape[:2], -1).mean(1)

    def add(self, outputs: Tensor) -> None:
        """Take in further predictions, shaped as the reference; samples that are not finite are left out."""
        signals = self.signals(_finite(outputs))
        self._window = torch.cat((self._window, signals))[-self._size :]
        self._n_new += len(signals)

    def test(self) -> DriftTest | None:
        """Compare the window with the reference; None until it is full and half of it is new."""
        if len(self._window) < self._size or self._n_new < self._size // 2:
            return None
        self._n_new = 0
        z = self._z().abs()
        largest = int(z.argmax())
        statistic = float(z[largest])
        self.n_tests += 1
        alarm = statistic > self.threshold
        self.n_alarms += alarm
        self._n_in_a_row = self._n_in_a_row + 1 if alarm else 0
        return DriftTest(statistic, self.threshold, self.names[largest], self._n_in_a_row >= IN_A_ROW)

    def _z(self) -> Tensor:
        """(n_signals,) rank sums in units of their standard deviation; ties count half, which makes them smaller."""
        n, m = self._reference.shape[-1], len(self._window)
        if n == 0:
            return torch.zeros(len(self.names))
        values = self._window.T.contiguous()
        below = torch.searchsorted(self._reference, values)
        up_to = torch.searchsorted(self._reference, values, right=True)
        rank_sum = (below + up_to).double().sum(-1) / 2
        return (rank_sum - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def _finite(outputs: Tensor) -> Tensor:
    outputs = outputs.detach().float().cpu()
    return outputs[torch.isfinite(outputs).flatten(1).all(-1)]
