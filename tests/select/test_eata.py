import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.select.eata import Reliable


@pytest.fixture
def model() -> nn.Linear:
    """Answers with its inputs: four logits per sample."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.eye_(model.weight)
    return model


def pool_of(answers: list[tuple[int, float]]) -> Samples:
    """Each sample answers with a class and its probability; the others share the rest."""
    rows = torch.stack([torch.full((4,), (1 - p) / 3).index_fill(0, torch.tensor(c), p) for c, p in answers])
    return Samples(rows.log(), tuple(map(str, range(len(answers)))))


def test_unsure_samples_come_last_the_surest_first(model):
    pool = pool_of([(0, 0.5), (0, 0.99), (1, 0.4), (1, 0.98), (2, 0.6)])
    method = Reliable(redundancy=10.0)
    assert method.select(model, pool, 2) == (1, 3)
    assert method.select(model, pool, 3) == (1, 3, 4)  # fewer pass than are wanted
    assert method.select(model, pool, 4) == (0, 1, 3, 4)


def test_what_is_like_those_kept_before_is_passed_over(model):
    """One sample at a time: after class 0 another of class 0 is redundant, but class 1 is not."""
    pool = pool_of([(0, 0.98)] * 6 + [(1, 0.98)] * 2)
    for seed in range(8):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
        first = order[0]
        other = next(place for place in order if (place >= 6) != (first >= 6))
        chosen = Reliable(window=1, redundancy=0.5).select(model, pool, 2, seed=seed)
        assert chosen == tuple(sorted((first, other))), order


def test_the_moving_average_by_hand(model):
    """mean = p0, then 0.9 p0 + 0.1 p1: class 1 has a cosine of about 0.13 to it, class 0 of about 0.99."""
    p0, p1, p2 = (torch.eye(4)[k] * 0.96 + 0.01 for k in range(3))
    passed = Reliable(window=1, redundancy=0.1)._passing(torch.stack([p0, p0, p1, p1, p2, p0]), 6)
    assert passed.tolist() == [0, 2, 4]
    together = Reliable(window=6)._passing(torch.stack([p0, p0, p1, p1, p2, p0]), 6)
    assert together.tolist() == [0, 1, 2, 3, 4, 5]  # within a window nothing is compared


def test_the_first_that_pass_are_taken_in_the_drawn_order(model):
    pool = pool_of([(k % 4, 0.97) for k in range(40)])
    chosen = {Reliable().select(model, pool, 5, seed=seed) for seed in range(6)}
    assert len(chosen) == 6
    assert all(len(places) == 5 for places in chosen)


@pytest.mark.parametrize("wrong", [{"e0": 2.0}, {"redundancy": -1.0}, {"window": 0}])
def test_wrong_settings(wrong):
    with pytest.raises(InvalidValueError, match="eata"):
        Reliable(**wrong)
