"""A share that was counted, with its interval: accuracy, agreement."""

import math
from dataclasses import dataclass

from ttmpd.errors import InvalidValueError


@dataclass(frozen=True, slots=True)
class Proportion:
    """Share of predictions with a property, with its 95 % Wilson interval.

    Args:
        share: from 0 to 1.
        low: lower end of the interval.
        high: upper end.
        n: number of predictions that were counted.
    """

    share: float
    low: float
    high: float
    n: int


def proportion(n_hits: int, n: int) -> Proportion:
    """Wilson score interval at 95 % (Wilson, 1927) for ``n_hits`` of ``n``.

    Raises:
        InvalidValueError: ``n`` is not positive or ``n_hits`` lies outside 0..n.

    Example:
        >>> proportion(8, 10).share
        0.8
    """
    if n < 1 or not 0 <= n_hits <= n:
        raise InvalidValueError(f"n_hits must lie in 0..n, n >= 1, but got {n_hits} of {n}")
    z, p = 1.959964, n_hits / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Proportion(p, max(0.0, center - half), min(1.0, center + half), n)
