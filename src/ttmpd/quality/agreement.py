"""Agreement of two models, with its interval."""

import math
from dataclasses import dataclass

from ttmpd.errors import InvalidValueError


@dataclass(frozen=True, slots=True)
class Agreement:
    """Share of samples on which two models answer alike, with its 95 % Wilson interval. It is not accuracy."""

    share: float
    low: float
    high: float
    n_samples: int


def agreement(n_alike: int, n_samples: int) -> Agreement:
    """Wilson score interval at 95 % (Wilson, 1927) for ``n_alike`` of ``n_samples``.

    Raises:
        InvalidValueError: ``n_samples`` is not positive or ``n_alike`` lies outside 0..n_samples.
    """
    if n_samples < 1 or not 0 <= n_alike <= n_samples:
        raise InvalidValueError(f"n_alike must lie in 0..n_samples, n_samples >= 1, but got {n_alike} of {n_samples}")
    z, p, n = 1.959964, n_alike / n_samples, n_samples
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Agreement(p, max(0.0, center - half), min(1.0, center + half), n)
