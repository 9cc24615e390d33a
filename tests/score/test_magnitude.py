import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.records import DepthUnit
from ttmpd.score.magnitude import Magnitude


def score(module: nn.Module) -> float:
    model = nn.Sequential(module)
    unit = DepthUnit("block", "0", "M", (2,), "channels_last", 1, 1)
    return Magnitude().score(model, [unit], Samples(torch.zeros(1, 2), ("a",)))[0].harm


def test_mean_absolute_weight_by_hand():
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    layer.bias.data = torch.tensor([100.0, 100.0])
    assert score(layer) == pytest.approx(2.5)


def test_layers_count_by_their_size():
    block = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 4, bias=False), nn.BatchNorm1d(4))
    block[0].weight.data.fill_(4.0)
    block[1].weight.data.fill_(1.0)
    assert score(block) == pytest.approx((2 * 4 + 4 * 1) / 6)


def test_vectors_count_where_there_is_nothing_else():
    norm = nn.BatchNorm1d(2)
    norm.weight.data = torch.tensor([1.0, 3.0])
    assert score(norm) == pytest.approx(1.0)
    assert score(nn.Identity()) == 0.0
