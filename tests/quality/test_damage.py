"""How far features move: by hand, and with the shortcuts of the computation switched off."""

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.quality.damage import replacement_damage, skippable
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units


class Res(nn.Module):
    def __init__(self, width: int = 6, linear: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.Identity() if linear else nn.Tanh()

    def forward(self, x):
        return x + 2 * self.b(self.act(self.a(x)))


def samples_of(inputs: torch.Tensor) -> Samples:
    return Samples(inputs, tuple(map(str, range(len(inputs)))))


def test_damage_by_hand():
    """Dropping x + 2 b(tanh(a x)) moves the final features by that branch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Sequential(Res()), nn.Linear(6, 3)).eval()
    samples = samples_of(torch.randn(16, 5))
    units = Block().find(model, samples.batch(slice(0, 2))).units
    found = replacement_damage(model, units, samples, lambda _u: {"drop": lambda x: x}, batch_size=5)[
        units[0].id, "drop"
    ]
    with torch.no_grad():
        x = model[0](samples.inputs)
        features = model[1](x)
        variance = features.var(0, unbiased=False).sum() * 16
    assert found == pytest.approx(float((features - x).square().sum() / variance), rel=1e-4)


def test_skipping_earlier_units_gives_what_the_whole_run_gives(monkeypatch):
    model, samples = tiny_model(n_blocks=4), tiny_samples(9)
    units = tiny_units(model)
    ran = {unit.id: 0 for unit in units}
    for unit in units:
        model.get_submodule(unit.path).conv1.register_forward_hook(
            lambda *_, name=unit.id: ran.__setitem__(name, ran[name] + 1)
        )

    def replacements(_unit):
        return {"drop": lambda x: x, "half": lambda x: x / 2}

    short = replacement_damage(model, units, samples, replacements, batch_size=4)
    calls_short = dict(ran)
    monkeypatch.setattr("ttmpd.quality.damage.skippable", lambda *_: frozenset())
    whole = replacement_damage(model, units, samples, replacements, batch_size=4)
    calls_whole = {name: ran[name] - calls_short[name] for name in ran}
    for key, parts in whole.items():
        assert short[key] == pytest.approx(parts, rel=1e-4, abs=1e-7)
    # Of three batches with two replacements, the first block is run once per batch instead of 1 + 3 x 2 times.
    assert calls_whole[units[0].id] - calls_short[units[0].id] > 3 * 2 * 2


class Chain(nn.Module):
    def __init__(self, n_blocks: int) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(5, 6), nn.Sequential(*[Res() for _ in range(n_blocks)])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class Around(Chain):
    """A shortcut around the second block joins the first one's output to the head's input."""

    def forward(self, x):
        first = self.body[0](self.stem(x))
        return self.head(self.body[1](first) + first)


@pytest.mark.parametrize(("model", "n_skippable"), [(Chain(3), 3), (Around(2), 1)])
def test_units_can_be_skipped_unless_a_long_shortcut_goes_around_them(model, n_skippable):
    batch = torch.randn(2, 5)
    units = Block().find(model.eval(), batch).units
    assert len(units) == len(model.body)
    assert skippable(model, units, batch) == {unit.id for unit in units[:n_skippable]}


def test_without_units_the_teacher_is_not_run():
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("was run"))
    assert replacement_damage(model, [], tiny_samples(4), lambda _u: {}) == {}
