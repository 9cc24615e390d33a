"""Fits of one layer, against cases that can be worked out by hand."""

import pytest
import torch
from torch import nn

from ttmpd.models.modules import clone
from ttmpd.repair.refit import FitRows, refit
from ttmpd.repair.refit_points import RefitPoint

RNG = torch.Generator().manual_seed(0)
NO_SHORTCUT = torch.zeros(1, 1)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


def student(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def site(net: nn.Module, norm: bool = False, activation: str = "", joined: bool = False) -> RefitPoint:
    n = len(net[0].weight)
    if isinstance(net[0], nn.Conv2d):
        return RefitPoint(
            "0", "1" if norm else "0", (n, 1, 1), "channels_first", "1" if norm else "", joined, activation
        )
    return RefitPoint("0", "0", (n,), "channels_last", adds_to_residual=joined, activation=activation)


def rows(x, wanted, shortcut=NO_SHORTCUT) -> FitRows:
    return FitRows(x, wanted, shortcut, torch.ones(len(x)))


def test_a_linear_answer_is_recovered():
    net, weight, bias, x = student(nn.Linear(5, 3)), rand(3, 5), rand(3), rand(200, 5)
    for ridge in (0.0, None):
        refit(net, site(net), rows(x, x @ weight.T + bias), ridge)
        assert torch.allclose(net[0].weight, weight, atol=1e-2)
        assert torch.allclose(net[0].bias, bias, atol=1e-2)


def test_an_infinite_ridge_leaves_the_weights_and_moves_the_bias():
    net, x = student(nn.Linear(5, 3)), rand(200, 5)
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        refit(net, site(net), rows(x, net[0](x) + 2.0), ridge=1e12)
    assert torch.allclose(net[0].weight, before, atol=1e-5)


def test_a_layer_without_a_bias_gets_none():
    net, weight, x = student(nn.Linear(5, 3, bias=False)), rand(3, 5), rand(200, 5)
    refit(net, site(net), rows(x, x @ weight.T), 0.0)
    assert net[0].bias is None
    assert torch.allclose(net[0].weight, weight, atol=1e-4)


def test_what_the_shortcut_brings_is_left_to_the_shortcut():
    net, weight, x, shortcut = student(nn.Linear(5, 3)), rand(3, 5), rand(200, 5), rand(200, 3)
    refit(net, site(net, joined=True), rows(x, x @ weight.T + shortcut, shortcut), 0.0)
    assert torch.allclose(net[0].weight, weight, atol=1e-4)


def test_only_signs_are_wanted_of_what_is_clipped():
    # The teacher's negative answers are garbage: behind the relu nobody sees them.
    net, weight, x = student(nn.Linear(5, 1)), rand(1, 5), rand(400, 5)
    true = x @ weight.T
    wanted = torch.where(true > 0, true, -100 * rand(400, 1).abs())
    plain, aware = clone(net), clone(net)
    refit(plain, site(net), rows(x, wanted), 1e-6)
    refit(aware, site(net, activation="relu"), rows(x, wanted), 1e-6)
    with torch.no_grad():
        gaps = [float((found[0](x).relu() - true.relu()).square().mean()) for found in (plain, aware)]
    assert gaps[1] < gaps[0] / 10


def test_above_six_relu6_asks_for_no_value_either():
    net, x = student(nn.Linear(1, 1)), torch.linspace(-3, 3, 200)[:, None]
    wanted = torch.where(4 * x + 2 >= 6, 1000.0, 4 * x + 2)
    for _ in range(20):  # each call sets the wanted values anew twice
        refit(net, site(net, activation="relu6"), rows(x, wanted), 1e-9)
    with torch.no_grad():
        assert float((net[0](x).clamp(0, 6) - (4 * x + 2).clamp(0, 6)).abs().max()) < 0.5


def test_noise_is_not_fitted():
    # Nothing can be learned about the change: three quarters of the rows say another thing than the last quarter.
    net, x = student(nn.Linear(30, 3)), rand(60, 30)
    before = clone(net)
    with torch.no_grad():
        refit(net, site(net), rows(x, net[0](x) + rand(60, 3)))
        wanted = before[0](x)
        assert float((net[0](x) - wanted).square().mean()) < 0.1
        refit(before, site(before), rows(x, wanted + rand(60, 3)), 1e-6)
        assert float((before[0](x) - wanted).square().mean()) > 0.3


def test_where_no_fit_is_better_on_unseen_rows_the_layer_stays():
    net, x = student(nn.Linear(4, 2)), rand(40, 4)
    before = net[0].weight
    with torch.no_grad():
        wanted = net[0](x)
        wanted[:30] += 5 * rand(30, 2)  # the last quarter is right as it is
        refit(net, site(net), rows(x, wanted))
    assert net[0].weight is before


def normed() -> nn.Sequential:
    net = student(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6))
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2.0)
        net[1].bias.normal_()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2.0)
    return net


def as_images(x):
    return x[:, :, None, None]


def test_a_batch_norm_is_fitted_with_its_layer():
    net, weight, bias, x = normed(), rand(6, 4), rand(6), rand(300, 4)
    refit(net, site(net, norm=True), rows(x, x @ weight.T + bias), 0.0)
    with torch.no_grad():
        assert torch.allclose(net(as_images(x)).flatten(1), x @ weight.T + bias, atol=1e-3)


def test_training_starts_from_the_function_that_was_fitted():
    net, weight, x = normed(), rand(6, 4), rand(300, 4)
    lengths = net[0].weight.detach().flatten(1).norm(dim=1)
    refit(net, site(net, norm=True), rows(x, x @ weight.T), 0.0)
    with torch.no_grad():
        evaluated = net(as_images(x))
        assert torch.allclose(clone(net).train()(as_images(x)), evaluated, atol=1e-3)  # statistics of this batch
    assert torch.allclose(net[0].weight.detach().flatten(1).norm(dim=1), lengths, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_handful_of_rows_is_no_trouble(n):
    net, x = student(nn.Linear(5, 3)), rand(n, 5)
    refit(net, site(net), rows(x, rand(n, 3)))
    assert bool(torch.isfinite(net[0].weight).all())
