"""Which positions enter a fit, and their weights."""

import dataclasses

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.records import DepthUnit
from ttmpd.repair.positions import PositionSample, _energy, _scaled, choose_positions, squared_gradients
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model, tiny_units


class Res(nn.Module):
    def __init__(self, width: int = 6, linear: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.Identity() if linear else nn.Tanh()

    def forward(self, x):
        return x + 2 * self.b(self.act(self.a(x)))


class Tokens(nn.Module):
    """Only token 0 reaches the output; the blocks treat every token alone."""

    def __init__(self, ids: bool = False) -> None:
        super().__init__()
        self.stem = nn.Embedding(9, 6) if ids else nn.Linear(5, 6)
        self.blocks, self.head, self.ids = nn.Sequential(Res(), Res()), nn.Linear(6, 3), ids

    def forward(self, x):
        return self.head(self.blocks(self.stem(x.long() if self.ids else x))[:, 0])


def samples_of(inputs: torch.Tensor) -> Samples:
    return Samples(inputs, tuple(map(str, range(len(inputs)))))


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    model, samples = Tokens().eval(), samples_of(torch.randn(30, 4, 5))
    return model, samples, Block().find(model, samples.batch(slice(0, 2))).units


def unit_of(shape=(5,), layout="channels_last", activation="") -> DepthUnit:
    return DepthUnit("block", "body.0", "B", shape, layout, 1, 1, activation)


def test_positions_are_drawn_without_repetition_and_by_seed():
    unit = unit_of((5, 20, 20), "channels_first")
    found = choose_positions(unit, seed=1)
    assert len(set(found.tolist())) == 64
    assert int(found.max()) < 400
    assert torch.equal(found, choose_positions(unit, seed=1))
    assert not torch.equal(found, choose_positions(unit, seed=2))
    assert choose_positions(unit_of((5,))).tolist() == [0]


def test_only_the_position_that_reaches_the_output_has_weight(tokens):
    model, samples, units = tokens
    pattern = squared_gradients(model, units, samples.first(8))
    for unit in units:
        assert pattern[unit.id].tolist() == pytest.approx([4.0, 0.0, 0.0, 0.0])


def test_the_most_sensitive_position_is_always_drawn(tokens):
    unit = dataclasses.replace(tokens[2][0], shape=(500, 8))
    pattern = torch.ones(500)
    pattern[321] = 2.0
    assert all(321 in choose_positions(unit, pattern, seed=seed, limit=4).tolist() for seed in range(5))


def test_weights_blend_with_equal_ones_and_follow_the_rows(tokens):
    model, samples, units = tokens
    pattern = squared_gradients(model, units, samples.first(8))
    chosen, batch = {units[0].id: torch.tensor([0, 2])}, samples.batch(slice(0, 2))
    weights = PositionSample(samples, pattern, chosen, 0.9).row_weights(units[0], batch, 4)
    assert weights.tolist() == pytest.approx([0.1 + 0.9 * 4, 0.1, 0.1 + 0.9 * 4, 0.1])
    assert PositionSample(samples, pattern, chosen, 0.0).row_weights(units[0], batch, 4).tolist() == [1.0] * 4


def test_patterns_of_maps_count_positions():
    unit = tiny_units(tiny_model())[0]
    gradient = torch.zeros(2, 6, 8, 8)
    gradient[:, :, 3, 5] = 2.0
    pattern = _scaled(_energy(gradient, unit))
    assert pattern.shape == (64,)
    assert pattern.nonzero().flatten().tolist() == [3 * 8 + 5]
    assert float(pattern.mean()) == pytest.approx(1.0)
