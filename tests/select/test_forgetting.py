import copy
import math

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.select.forgetting import Forgetting, forgotten, perturb
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples


def test_flips_are_counted_from_agreement_to_disagreement():
    rows = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    found = forgotten(torch.tensor(rows).bool().T)
    assert found.tolist() == [0.0, 2.0, 0.0, math.inf, 1.0]


def test_noise_is_relative_and_for_matrices_alone():
    net = tiny_model()
    shaken = copy.deepcopy(net)
    perturb(shaken, 0.1, seed=0)
    for (name, before), after in zip(net.named_parameters(), shaken.parameters(), strict=True):
        gap = float((after - before).detach().square().mean().sqrt())
        size = float(before.detach().square().mean().sqrt()) if before.dim() > 1 else 0.0
        assert gap == pytest.approx(0.1 * size, rel=0.3), name


def test_the_same_seed_gives_the_same_choice_and_nothing_is_touched():
    net, pool = tiny_model(dropout=0.5), tiny_samples(40)
    method = Forgetting(train_batch_size=8, noise=0.5)
    with assert_untouched(net, pool):
        first = method.select(net, pool, 8, seed=1)
    torch.manual_seed(5)
    assert method.select(net.eval(), pool, 8, seed=1) == first
    assert len({method.select(net, pool, 8, seed=seed) for seed in range(4)}) > 1


def test_samples_far_from_every_boundary_are_never_forgotten():
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    far = torch.tensor([[9.0, -9.0], [-9.0, 9.0]]).repeat(10, 1)
    near = torch.tensor([[0.01, -0.01], [-0.01, 0.01]]).repeat(3, 1)
    pool = Samples(torch.cat([far, near]), tuple(map(str, range(26))))
    assert Forgetting(noise=0.5).select(model, pool, 6) == tuple(range(20, 26))


def test_what_never_agrees_with_its_label_comes_first():
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    x = torch.tensor([[5.0, -5.0], [-5.0, 5.0]]).repeat(10, 1)
    labels = torch.tensor([0, 1]).repeat(10)
    labels[[4, 11]] = 1 - labels[[4, 11]]
    pool = Samples(x, tuple(map(str, range(20))))
    assert Forgetting(noise=0.01).select(model, pool, 2, labels=labels) == (4, 11)


def test_among_what_never_agrees_the_least_probable_label_comes_first():
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    x = torch.tensor([[5.0, -5.0], [-5.0, 5.0]]).repeat(10, 1)
    x[[4, 11]] *= 0.4
    labels = torch.tensor([0, 1]).repeat(10)
    labels[[4, 11, 14, 17]] = 1 - labels[[4, 11, 14, 17]]
    pool = Samples(x, tuple(map(str, range(20))))
    method = Forgetting(noise=0.01)
    assert method.select(model, pool, 4, labels=labels) == (4, 11, 14, 17)
    assert method.select(model, pool, 2, labels=labels) == (14, 17)


def test_nothing_that_can_be_answered():
    model = nn.Linear(2, 2)
    pool = Samples(torch.full((5, 2), math.nan), tuple("abcde"))
    assert len(Forgetting().select(model, pool, 2)) == 2


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"noise": -0.1}, {"lr": -1.0}, {"train_batch_size": 0}])
def test_wrong_settings(wrong):
    with pytest.raises(InvalidValueError, match="forgetting"):
        Forgetting(**wrong)
