"""Ridge least squares from running sums."""

import torch

from ttmpd.repair.least_squares import NormalEquations


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums_of(h: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> NormalEquations:
    sums = NormalEquations(h.shape[1], y.shape[1])
    for rows in torch.arange(len(h)).split(7):  # in batches, as they come
        sums.add(h[rows], y[rows], torch.ones(len(rows)) if weight is None else weight[rows])
    return sums


def test_a_layer_is_found_again_from_what_it_reads_and_answers():
    h, weight, bias = drawn(60, 5), drawn(3, 5, seed=1), drawn(3, seed=2)
    found, found_bias = sums_of(h, h @ weight.T + bias).solve(torch.zeros(3, 5), torch.zeros(3), ridge=1e-9)
    assert torch.allclose(found, weight, atol=1e-4)
    assert torch.allclose(found_bias, bias, atol=1e-4)


def test_an_infinite_ridge_keeps_the_old_weights():
    h, old = drawn(60, 5), drawn(3, 5, seed=1)
    found, _ = sums_of(h, drawn(60, 3, seed=2)).solve(old, torch.zeros(3), ridge=1e9)
    assert torch.allclose(found, old, atol=1e-6)


def test_a_layer_without_a_bias_stays_without_one():
    h, weight = drawn(60, 5), drawn(3, 5, seed=1)
    found, bias = sums_of(h, h @ weight.T).solve(torch.zeros(3, 5), torch.zeros(3), ridge=1e-9, free_bias=False)
    assert bias is None
    assert torch.allclose(found, weight, atol=1e-4)


def test_rows_of_no_weight_do_not_count():
    h, y, weight = drawn(60, 5), drawn(60, 3, seed=1), torch.ones(60)
    weight[30:] = 0
    old, bias = torch.zeros(3, 5), torch.zeros(3)
    few, _ = sums_of(h[:30], y[:30]).solve(old, bias, ridge=1e-3)
    found, _ = sums_of(h, y, weight).solve(old, bias, ridge=1e-3)
    assert torch.allclose(found, few, atol=1e-5)
