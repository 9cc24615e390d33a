"""Linear maps in the place of units."""

import pytest
import torch
from torch import nn

from ttmpd.records import DepthUnit
from ttmpd.repair.unfold import rows
from ttmpd.surgery.replacements import LinearMap, put
from ttmpd.surgery.units.block import Block

RNG = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


def unit_of(shape=(5,), layout="channels_last", activation="") -> DepthUnit:
    return DepthUnit("block", "body.0", "B", shape, layout, 1, 1, activation)


def install(model: nn.Module, unit: DepthUnit, fit: LinearMap) -> None:
    module = Block().replacement(unit)
    linear = module[0] if isinstance(module, nn.Sequential) else module
    with torch.no_grad():
        linear.weight.copy_(fit.weight.view_as(linear.weight))
        linear.bias.copy_(fit.bias)
    put(model, unit, module)


@pytest.mark.parametrize(
    ("shape", "layout", "x"),
    [
        ((5, 3, 4), "channels_first", (2, 5, 3, 4)),
        ((5, 7), "channels_first", (2, 5, 7)),
        ((7, 5), "channels_last", (2, 7, 5)),
        ((3, 4, 5), "channels_last", (2, 3, 4, 5)),
        ((5,), "channels_last", (2, 5)),
    ],
)
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
def test_a_map_answers_like_the_stand_in_it_is_installed_as(shape, layout, x, activation):
    unit, fit, x = unit_of(shape, layout, activation), LinearMap(9 * rand(5, 5), rand(5)), rand(*x)
    model = nn.Module()
    model.body = nn.ModuleList([nn.Identity()])
    install(model, unit, fit)
    wanted = rows(x, unit.layout, torch.arange(x[0].numel() // 5)) @ fit.weight.T + fit.bias
    wanted = {"": wanted, "relu": wanted.relu(), "relu6": wanted.clamp(0, 6)}[activation]
    with torch.no_grad():
        for answer in (model.body[0](x), fit(unit, x)):
            assert answer.shape == x.shape
            assert torch.allclose(rows(answer, unit.layout, torch.arange(x[0].numel() // 5)), wanted, atol=1e-4)
