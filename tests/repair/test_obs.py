"""Closed forms for heads and neurons: the fit, the choice of members, the factors, and where shortcuts are joined."""

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.models.run import predict
from ttmpd.records import Removal
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.repair.obs import select_members
from ttmpd.repair.refit import FitRows, member_factors, rescale_members
from ttmpd.repair.refit_points import RefitPoint
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.cut import cut
from ttmpd.surgery.find import find_units
from ttmpd.testing.tiny_models import tiny_token_samples, tiny_tokens, tiny_transformer


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums_of(h: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> NormalEquations:
    sums = NormalEquations(h.shape[1], y.shape[1])
    for rows in torch.arange(len(h)).split(7):  # in batches, as they come
        sums.add(h[rows], y[rows], torch.ones(len(rows)) if weight is None else weight[rows])
    return sums


def test_what_the_others_can_say_goes_first():
    # Member 2 is the sum of the first two, member 3 says nothing: with both gone nothing is lost.
    first = drawn(80, 2)
    h = torch.cat([first, first.sum(1, keepdim=True), 0 * first[:, :1], drawn(80, 1, seed=3)], 1)
    weight, bias = drawn(4, 5, seed=1), drawn(4, seed=2)
    found = select_members(sums_of(h, h @ weight.T + bias), weight, bias, 5, (3, 2), ridge=1e-9)
    assert 3 not in found[0].members
    assert {0, 1, 2} - set(found[0].members) != set()
    assert found[0].error == pytest.approx(0, abs=1e-4)
    assert found[1].error > 0.01
    assert set(found[1].members) < set(found[0].members)


@pytest.mark.parametrize("size", [1, 3])
def test_the_error_is_that_of_the_best_fit(size):
    members = 6
    h, weight, bias = drawn(200, members * size), drawn(4, members * size, seed=1), drawn(4, seed=2)
    h = h @ drawn(members * size, members * size, seed=3)  # members know of each other
    y = h @ weight.T + bias
    for choice in select_members(sums_of(h, y), weight, bias, members, (4, 2, 1), ridge=1e-9):
        index = torch.tensor([m * size + i for m in choice.members for i in range(size)])
        design = torch.cat([h[:, index], torch.ones(200, 1)], 1).double()
        best = torch.linalg.lstsq(design, y.double())[0]
        lost = float((y - design @ best).square().sum() / (y - y.mean(0)).square().sum())
        assert choice.error == pytest.approx(lost, rel=1e-3, abs=1e-6)
        assert torch.allclose(choice.weight.double(), best[:-1].T, atol=1e-3)


def test_nothing_kept_loses_all_but_the_mean():
    h, weight, bias = drawn(200, 4), drawn(3, 4, seed=1), drawn(3, seed=2)
    y = h @ weight.T + bias
    found = select_members(sums_of(h, y), weight, bias, 4, (0,), ridge=1e-9)[0]
    assert found.members == ()
    assert found.error == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(found.bias, y.mean(0), atol=1e-4)


def test_factors_are_those_of_damped_least_squares():
    h, weight = drawn(50, 4), drawn(6, 4, seed=1)
    wanted = h @ (weight * torch.tensor([0.5, 1.0, 2.0, 1.5])).T
    found = member_factors(sums_of(h, wanted), weight, torch.zeros(6), size=1, damp=0.0)
    assert torch.allclose(found, torch.tensor([0.5, 1.0, 2.0, 1.5]), atol=1e-3)
    contributions = torch.stack([torch.outer(h[:, i], weight[:, i]).flatten() for i in range(4)], 1).double()
    stacked = torch.cat([contributions, torch.eye(4).double()])
    right = torch.cat([wanted.flatten().double() - contributions.sum(1), torch.zeros(4).double()])
    damped = 1 + torch.linalg.lstsq(stacked, right[:, None])[0][:, 0]
    assert torch.allclose(
        member_factors(sums_of(h, wanted), weight, torch.zeros(6), size=1).double(), damped, atol=1e-4
    )


def test_factors_out_of_range_are_not_trusted():
    h, weight = drawn(50, 2), drawn(6, 2, seed=1)
    assert member_factors(sums_of(h, h @ (20 * weight).T), weight, torch.zeros(6), size=1, damp=0.0) is None


def test_rescaling_never_increases_the_error_of_a_layer():
    model, samples = tiny_transformer(), tiny_token_samples(24)
    for unit in find_units(model, tiny_tokens(), ["neuron", "head"]).units:
        removal = Removal(unit, "narrow", tuple(range(unit.n_members // 2)))
        students = [cut(model, [removal]), repaired(model, [removal], samples, refit_scope="rescale", sensitivity=0.0)]
        wanted = output_of(model, unit.path, samples)
        before, after = (float((output_of(s, unit.path, samples) - wanted).square().sum()) for s in students)
        assert after <= before * (1 + 1e-6)


def output_of(model: nn.Module, path: str, samples) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        predict(model, samples.batch(slice(None)))
    handle.remove()
    return seen[0]


def test_a_refit_brings_the_student_nearer_than_factors_and_those_nearer_than_nothing():
    model, samples = tiny_transformer(), tiny_token_samples(64)
    units = find_units(model, tiny_tokens(), ["neuron"]).units
    removals = [Removal(unit, "narrow", tuple(range(unit.n_members // 2))) for unit in units]
    batch = samples.batch(slice(None))
    students = [
        cut(model, removals), repaired(model, removals, samples, refit_scope="rescale"),
        repaired(model, removals, samples, refit_scope="removed_only"),
    ]  # fmt: skip
    with torch.no_grad():
        gaps = [float((predict(student, batch) - predict(model, batch)).square().mean()) for student in students]
    assert gaps[2] < gaps[1] < gaps[0]


def test_factors_that_cannot_be_trusted_leave_the_layer_as_it_is():
    model = tiny_transformer()
    unit = find_units(model, tiny_tokens(), ["neuron"]).units[0]
    student = cut(model, [Removal(unit, "narrow", (0, 1))])
    layer = student.get_submodule(unit.path)
    before, h = layer.weight.detach().clone(), drawn(40, 2)
    fit_rows = FitRows(h, h @ (50 * before).T + layer.bias.detach(), torch.zeros(1, 1), torch.ones(40))
    point = RefitPoint(unit.path, unit.path, unit.shape, unit.layout, n_members=2)
    assert not rescale_members(student, point, fit_rows)
    assert torch.equal(layer.weight, before)


def test_a_layer_that_reads_one_narrowed_layer_and_makes_another_is_fitted_to_what_is_left_of_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))
    units = find_units(net.eval(), drawn(2, 4), ["neuron"]).units
    assert [unit.path for unit in units][:2] == ["2", "4"]
    samples = Samples(drawn(64, 4), tuple(map(str, range(64))))
    removals = [Removal(unit, "narrow", tuple(range(0, 16, 2))) for unit in units[:2]]
    with torch.no_grad():
        gaps = [
            float((student(samples.inputs) - net(samples.inputs)).square().mean())
            for student in (cut(net, removals), repaired(net, removals, samples))
        ]
    assert gaps[1] < gaps[0] / 2
