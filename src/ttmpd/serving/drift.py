"""Drift of a model's answers away from a reference: rank tests on a moving window, with known false alarms."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ttmpd.method import check_range
from ttmpd.training.losses import entropy

N_DIRECTIONS = 4
"""Random directions along which logits are compared, beside their entropy and their size."""
NAMES = (
    "entropy",
    "log sum exp",
    *(f"logits along {i}" for i in range(N_DIRECTIONS)),
    *(f"spread along {i}" for i in range(N_DIRECTIONS)),
)
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
    """Compares the last answers of a model with a reference of the same model's answers.

    Every answer becomes ten signals: its entropy, the log sum exp of its logits, and its standardised logits along four
    random directions, as they are (where the mean moved) and as distances from the reference's median (where the spread
    changed). Each is compared by the Mann-Whitney rank test, whose distribution does not depend on that of the signal.

    False alarms: while window and reference are independent draws from one distribution, a test alarms with a
    probability of at most ``false_alarm`` (Bonferroni over the signals, normal approximation of the rank sum); data are
    said to have moved after two alarms in a row, which is rarer. Samples that come sorted or in scenes are not
    independent: use a larger window for them.

    Args:
        reference: (n, n_classes) logits on samples that the model was not fitted on; with fewer than seven, nothing can
            exceed the threshold at the defaults.
        window: answers that are compared; a test is made whenever half of them are new.
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

    def __init__(self, reference: Tensor, *, window: int = 256, false_alarm: float = 1e-4, seed: int = 0) -> None:
        check_range("window", window, 8)
        check_range("false_alarm", false_alarm, 1e-12, 0.5)
        reference = _finite(reference)
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(reference.shape[-1], N_DIRECTIONS, generator=generator)
        self._directions = directions / directions.norm(dim=0).clamp_min(1e-12)
        self._mean = reference.mean(0) if len(reference) else torch.zeros(reference.shape[-1])
        self._scale = (reference.std(0) if len(reference) > 1 else torch.ones(reference.shape[-1])).clamp_min(1e-6)
        self._center = torch.zeros(N_DIRECTIONS)
        if len(reference):
            self._center = self._along(reference).median(0).values
        self._reference = self.signals(reference).T.contiguous().sort(-1).values
        self._window = torch.empty(0, len(NAMES))
        self._size, self._n_new, self._n_in_a_row = window, 0, 0
        self.threshold = NormalDist().inv_cdf(1 - false_alarm / (2 * len(NAMES)))
        self.n_tests = self.n_alarms = 0

    def _along(self, logits: Tensor) -> Tensor:
        along: Tensor = ((logits - self._mean) / self._scale) @ self._directions
        return along

    def signals(self, logits: Tensor) -> Tensor:
        """(n, 10) signals of finite logits."""
        along = self._along(logits)
        spread = (along - self._center).abs()
        return torch.cat((entropy(logits)[:, None], logits.logsumexp(-1, keepdim=True), along, spread), -1)

    def add(self, logits: Tensor) -> None:
        """Take in further answers, (B, n_classes); rows that are not finite are left out."""
        signals = self.signals(_finite(logits))
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
        return DriftTest(statistic, self.threshold, NAMES[largest], self._n_in_a_row >= IN_A_ROW)

    def _z(self) -> Tensor:
        """(10,) rank sums in units of their standard deviation; ties count half, which makes them smaller."""
        n, m = self._reference.shape[-1], len(self._window)
        if n == 0:
            return torch.zeros(len(NAMES))
        values = self._window.T.contiguous()
        below = torch.searchsorted(self._reference, values)
        up_to = torch.searchsorted(self._reference, values, right=True)
        rank_sum = (below + up_to).double().sum(-1) / 2
        return (rank_sum - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def _finite(logits: Tensor) -> Tensor:
    logits = logits.detach().float().cpu()
    return logits[torch.isfinite(logits).all(-1)]
