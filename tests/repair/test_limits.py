"""What is fitted is bounded by what the device can hold and by seconds, and what is not is named."""

import logging

import pytest
import torch
from torch import nn

from compress_cases import QUICK, set_compare
from ttmpd.data.open import open_samples
from ttmpd.latency.timing import Timings
from ttmpd.models.macs import count_macs
from ttmpd.pipeline.compress import compress
from ttmpd.records import Removal
from ttmpd.repair import least_squares, limits
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.repair.limits import Speed, fit_cost, too_large_to_fit
from ttmpd.repair.obs import largest_members
from ttmpd.repair.sequential import repaired
from ttmpd.score.ttmpd import TTMPD
from ttmpd.surgery.find import find_units


class Residual(nn.Module):
    """A wide MLP beside a shortcut."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def wide(hidden: int = 48, width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), Residual(width, hidden), Residual(width, hidden), nn.Linear(width, 4))


def inputs(n: int = 200) -> torch.Tensor:
    return torch.randn(n, 20, generator=torch.Generator().manual_seed(1))


def samples_of(x: torch.Tensor):
    return open_samples(x, None)


@pytest.fixture
def slow_device(monkeypatch):
    """A device on which nothing that reads more than 40 values is fitted in time."""
    monkeypatch.setattr(limits, "_PROBE", 40)
    monkeypatch.setattr(limits, "device_speed", lambda _: Speed(1.0, 1.0))


@pytest.fixture
def operations(monkeypatch):
    def compare(original, student, batch, **_):
        nets = {"original": original, "compressed": student}
        return Timings({name: (count_macs(net, batch[:1])[""] / 1e3,) * 5 for name, net in nets.items()})

    set_compare(monkeypatch, compare)


def test_cost_grows_with_the_sizes():
    speed = Speed(1e9, 1e9)
    small, large = fit_cost(100, 10, 1000, speed), fit_cost(200, 10, 1000, speed)
    assert 2 < large.seconds / small.seconds < 8
    assert large.n_bytes > small.n_bytes


def test_widths_that_people_use_are_fitted_on_this_machine():
    assert all(too_large_to_fit(nn.Linear(n, n // 4)) == "" for n in (2305, 3072, 4608))


def test_what_the_device_cannot_hold_is_named_with_its_numbers(monkeypatch):
    monkeypatch.setattr(limits, "memory_of", lambda _: 1 << 20)
    monkeypatch.setattr(limits, "device_speed", lambda _: Speed(1e12, 1e12))
    assert "reads 3000 values: its fit takes 0.9 of 0.0 GiB" in too_large_to_fit(nn.Linear(3000, 8, bias=False))


def test_blocks_of_sums_are_the_whole(monkeypatch):
    x, y = inputs(), inputs()[:, :3]
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(2))
    whole = NormalEquations(20, 3)
    whole.add(x, y, weight)
    monkeypatch.setattr(least_squares, "BLOCK", 7)
    blocks = NormalEquations(20, 3)
    blocks.add(x, y, weight)
    assert torch.allclose(blocks.gram, whole.gram, atol=1e-4)
    assert torch.allclose(blocks.gram, blocks.gram.T, atol=1e-4)
    assert torch.equal(blocks.cross, whole.cross)


def test_layers_beyond_the_device_stay_and_are_named(slow_device, caplog):
    model, samples = wide().eval(), inputs()
    unit = find_units(model, samples[:2], ["block"]).units[0]
    with caplog.at_level(logging.WARNING):
        student = repaired(model, [Removal(unit, "drop")], samples_of(samples))
    assert torch.equal(student[2].down.weight, model[2].down.weight)
    assert not torch.equal(student[2].up.weight, model[2].up.weight)  # reads 12 values alone
    assert "2.down is not fitted again: it reads 48 values: its fit takes" in caplog.text


def test_the_report_names_what_was_not_fitted(slow_device, operations):
    result = compress(wide(), inputs(), macs=0.7, units=("block",), actions=("drop",), adapt="none", **QUICK)
    assert [path for path, _ in result.report.unfitted] == ["1.down", "2.down"]


def test_members_of_a_layer_that_cannot_be_fitted_are_scored_without_repair(slow_device):
    model, samples = wide().eval(), samples_of(inputs())
    units = find_units(model, samples.batch(slice(0, 2)), ["neuron"]).units
    scores = TTMPD().score(model, units, samples)
    assert {score.unit_id for score in scores} == {unit.id for unit in units}
    matrix = model[1].down.weight.detach()
    hidden = model[1].up(model[0](samples.batch(slice(None)))).relu().detach()
    shares = matrix.square().sum(0) * hidden.square().sum(0)
    first = next(score for score in scores if score.unit_id == units[0].id)
    expected = shares.argsort(descending=True)[: len(first.kept)].sort().values.tolist()
    assert list(first.kept) == expected


def test_the_largest_members_keep_their_weights():
    matrix = torch.tensor([[3.0, 0.1, 2.0, 1.0]])
    choice = largest_members(torch.ones(4), matrix, torch.zeros(1), 4, (2,))[0]
    assert choice.members == (0, 2)
    assert choice.weight.tolist() == [[3.0, 2.0]]
    assert choice.error == pytest.approx(1.01 / 14.01)


@pytest.mark.parametrize("n", [120, 400])
def test_the_error_after_repair_is_no_more_than_was_predicted(n):
    """Fewer samples than the layer reads values: it fits all of them, which says nothing of others."""
    model, x = wide(hidden=256, width=16).eval(), inputs(n + 500)
    samples = samples_of(x[:n])
    unit = next(unit for unit in find_units(model, x[:2], ["neuron"]).units if unit.path == "2.down")
    scores = TTMPD(channels=1.0).score(model, [unit], samples)
    score = min(scores, key=lambda score: abs(len(score.kept) - 0.88 * unit.n_members))
    student = repaired(model, [Removal(unit, "narrow", score.kept)], samples)
    with torch.no_grad():  # damage is measured on the features that the head reads
        before, after = (net[2](net[1](net[0](x[n:]))) for net in (model, student))
    damage = float((after - before).square().sum() / (before - before.mean(0)).square().sum())
    assert damage <= 1.1 * score.harm + 1e-6
