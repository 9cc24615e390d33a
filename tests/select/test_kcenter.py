import itertools
import math

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.select.kcenter import KCenter, farthest_first


def radius(points: torch.Tensor, chosen) -> float:
    """The largest distance to the nearest chosen point."""
    return float(torch.cdist(points.double(), points[list(chosen)].double()).min(1).values.max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [1, 2, 4])
def test_at_most_twice_the_best_radius(seed, n):
    points = torch.randn(11, 3, generator=torch.Generator().manual_seed(seed))
    best = min(radius(points, chosen) for chosen in itertools.combinations(range(11), n))
    chosen = farthest_first(points, n, seed)
    assert len(set(chosen)) == n
    assert radius(points, chosen) <= 2 * best + 1e-6


def test_one_of_each_cluster():
    """An identity before the head makes the inputs the features."""
    centers = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [70.0, 70.0]])
    points = (centers[:, None] + 0.1 * torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))).flatten(0, 1)
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3))
    pool = Samples(points, tuple(map(str, range(20))))
    for seed in range(5):
        assert [place // 5 for place in KCenter().select(model, pool, 4, seed=seed)] == [0, 1, 2, 3]
    assert len({KCenter().select(model, pool, 4, seed=seed) for seed in range(5)}) > 1


def test_far_from_the_origin_and_with_repeated_points():
    points = torch.tensor([[0.0], [0.0], [1.0], [1.0], [2.0]]) + 1e5
    for seed in range(5):
        assert {float(points[i]) - 1e5 for i in farthest_first(points, 3, seed)} == {0.0, 1.0, 2.0}
        assert sorted(farthest_first(points, 5, seed)) == [0, 1, 2, 3, 4]


def test_rows_that_are_not_finite_come_last():
    points = torch.tensor([[math.nan], [1.0], [2.0], [math.inf], [3.0]])
    for seed in range(5):
        order = farthest_first(points, 5, seed)
        assert set(order[:3]) == {1, 2, 4}
        assert set(order[3:]) == {0, 3}
    assert len(set(farthest_first(torch.full((3, 2), math.nan), 2))) == 2
