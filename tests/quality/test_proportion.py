"""The interval of a share, by published values."""

import pytest

from ttmpd.errors import InvalidValueError
from ttmpd.quality.proportion import proportion


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_wilson_interval(hits, n, low, high):
    interval = proportion(hits, n)
    assert interval.share == hits / n
    assert interval.n == n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_of_nothing_is_refused(hits, n):
    with pytest.raises(InvalidValueError, match="n_hits"):
        proportion(hits, n)
