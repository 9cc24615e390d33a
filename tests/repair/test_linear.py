"""Linear replacements, against cases that can be worked out by hand."""

import pytest
import torch

from ttmpd.repair.linear import ReplacementFit
from ttmpd.surgery.replacements import LinearMap

RNG = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


def fitted(x, y, ridge=0.0, weight=None) -> LinearMap:
    equations = ReplacementFit(x.shape[1])
    equations.add(x, y, weight)
    return equations.solve(ridge)


def test_a_linear_map_is_recovered():
    weight, bias, x = rand(5, 5), rand(5), rand(40, 5)
    fit = fitted(x, x @ weight.T + bias)
    assert torch.allclose(fit.weight, weight, atol=1e-6)
    assert torch.allclose(fit.bias, bias, atol=1e-6)


def test_ridge_by_hand():
    # x = -1, 1 and y = 3x: the branch y - x = 2x; gram 2, penalty ridge x 2, so b = 4 / (2 + 2 ridge).
    x = torch.tensor([[-1.0], [1.0]])
    for ridge, b in [(0.0, 2.0), (1.0, 1.0), (3.0, 0.5)]:
        fit = fitted(x, 3 * x, ridge)
        assert float(fit.weight) == pytest.approx(1 + b, abs=1e-6)
        assert float(fit.bias) == pytest.approx(0.0, abs=1e-6)


def test_an_infinite_ridge_is_the_identity_with_the_bias_left_free():
    x = torch.tensor([[-1.0], [1.0]])
    fit = fitted(x, 3 * x + 5, ridge=1e12)
    assert float(fit.weight) == pytest.approx(1.0, abs=1e-6)
    assert float(fit.bias) == pytest.approx(5.0, abs=1e-6)


def test_weights_by_hand():
    # Constant inputs: only the bias is fitted, as the weighted mean of 0, 0, 6 with weights 1, 1, 2.
    x, y = torch.zeros(3, 1), torch.tensor([[0.0], [0.0], [6.0]])
    assert float(fitted(x, y).bias) == pytest.approx(2.0)
    assert float(fitted(x, y, weight=torch.tensor([1.0, 1.0, 2.0])).bias) == pytest.approx(3.0)


def test_weights_count_like_repeated_rows_and_zero_like_none():
    x, y, times = rand(6, 3), rand(6, 3), torch.tensor([1, 2, 0, 3, 1, 4])
    weighted = fitted(x, y, 0.01, times.float())
    repeated = fitted(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), 0.01)
    assert torch.allclose(weighted.weight, repeated.weight, atol=1e-6)
    assert torch.allclose(weighted.bias, repeated.bias, atol=1e-6)


def test_rows_in_chunks_equal_rows_at_once():
    x, y, weight = rand(50, 4), rand(50, 4), torch.rand(50, generator=RNG)
    chunks = ReplacementFit(4)
    for part in torch.arange(50).split(7):
        chunks.add(x[part], y[part], weight[part])
    whole = fitted(x, y, 1e-3, weight)
    found = chunks.solve(1e-3)
    assert torch.allclose(found.weight, whole.weight, atol=1e-6)
    assert torch.allclose(found.bias, whole.bias, atol=1e-6)


def test_the_solution_is_the_least_squares_one():
    x, y = rand(60, 4).double(), rand(60, 4).double()
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1)], 1), y).solution
    fit = fitted(x, y)
    assert torch.allclose(fit.weight.T.double(), wanted[:4], atol=1e-5)
    assert torch.allclose(fit.bias.double(), wanted[4], atol=1e-5)


def test_sums_are_exact_where_single_precision_is_not():
    # A large common offset: squares of 1e4 swallow differences of 1e-2 in float32.
    x = 1e4 + 1e-2 * torch.arange(2000).float()[:, None]
    fit = fitted(x, 3 * (x - 1e4))
    single = x.T @ x
    assert float(single) != float(x.double().T @ x.double())
    assert float(fit.weight) == pytest.approx(3.0, rel=1e-3)


def test_dead_and_doubled_channels_are_no_trouble():
    x = rand(30, 3)
    x[:, 1] = 0.0
    x[:, 2] = x[:, 0]
    y = 2 * x
    fit = fitted(x, y)
    assert bool(torch.isfinite(fit.weight).all())
    assert torch.allclose(x @ fit.weight.T + fit.bias, y, atol=1e-4)


def test_no_rows_give_the_identity():
    fit = ReplacementFit(3).solve(1e-3)
    assert torch.equal(fit.weight, torch.eye(3))
    assert torch.equal(fit.bias, torch.zeros(3))
