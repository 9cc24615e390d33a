"""PRACTISE: where adaptors go, and what they may and may not do."""

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.errors import UnsupportedError
from ttmpd.models.modules import clone
from ttmpd.score.practise import Practise, _blocks, _insert_adaptors
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import TinyBlock, tiny_model, tiny_samples, tiny_units


class Down(nn.Module):
    """A block that changes the shape, with a convolution on its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2)

    def forward(self, x):
        branch = self.conv2(self.conv1(x).relu())
        return (branch + self.shortcut(x)).relu()


class Stages(nn.Module):
    """Four blocks of one width, one that changes it, two of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(*[TinyBlock(6) for _ in range(4)], Down(), TinyBlock(8), TinyBlock(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


@pytest.fixture
def stages():
    torch.manual_seed(0)
    model, batch = Stages().eval(), tiny_samples(2).batch(slice(None))
    return model, Block().find(model, batch).units, batch


def adaptors(model: nn.Module) -> dict[str, str]:
    """Path of each adapted convolution -> on which side."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and len(module) == 2 and all(isinstance(m, nn.Conv2d) for m in module):
            first_is_new = module[0].kernel_size == (1, 1) and module[0].bias is None
            found[name] = "before" if first_is_new else "after"
    return found


def test_adaptors_stand_around_the_hole_up_to_the_next_stage(stages):
    model, units, batch = stages
    pruned = Block().cut(model, [units[1]])
    _insert_adaptors(pruned, units[1], _blocks(model, units, batch))
    assert adaptors(pruned) == {
        "blocks.0.conv2": "after",
        "blocks.2.conv1": "before",
        "blocks.3.conv1": "before",
        "blocks.4.conv1": "before",
        "blocks.4.shortcut": "before",
    }


def test_adaptors_of_the_next_stage_begin_behind_its_first_block(stages):
    model, units, batch = stages
    assert [unit.path for unit in units] == [f"blocks.{i}" for i in (0, 1, 2, 3, 5, 6)]
    pruned = Block().cut(model, [units[4]])
    _insert_adaptors(pruned, units[4], _blocks(model, units, batch))
    assert adaptors(pruned) == {"blocks.4.conv2": "after", "blocks.4.shortcut": "after", "blocks.6.conv1": "before"}


def test_adaptors_begin_as_the_identity(stages):
    model, units, batch = stages
    pruned = Block().cut(model, [units[1]]).eval()
    adapted = clone(pruned)
    _insert_adaptors(adapted, units[1], _blocks(model, units, batch))
    with torch.no_grad():
        assert torch.allclose(pruned(batch), adapted(batch), atol=1e-6)


def test_without_training_it_is_the_error_of_the_last_map():
    model, samples = tiny_model(), tiny_samples(10)
    units = tiny_units(model)
    scores = Practise(steps=0, train_batch_size=4).score(model, units, samples)
    for unit, score in zip(units, scores, strict=True):
        cut = Block().cut(model, [unit])
        with torch.no_grad():
            maps = [net.blocks(net.stem(samples.batch(slice(None)))) for net in (cut, model)]
        assert score.harm == pytest.approx(float((maps[0] - maps[1]).square().mean()), rel=1e-4)


def test_training_the_adaptors_lowers_the_error():
    model, samples = tiny_model(), tiny_samples(24)
    units = tiny_units(model)
    raw = Practise(steps=0).score(model, units, samples)
    trained = Practise(steps=80, train_batch_size=12).score(model, units, samples)
    assert all(after.harm < before.harm for before, after in zip(raw, trained, strict=True))


def test_a_model_without_a_feature_map_is_refused():
    class Res(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.a(x).tanh()

    model = nn.Sequential(nn.Linear(5, 6), nn.Sequential(Res(), Res()), nn.Linear(6, 3)).eval()
    samples = Samples(torch.randn(4, 5), tuple("abcd"))
    units = Block().find(model, samples.batch(slice(0, 2))).units
    assert len(units) == 2
    with pytest.raises(UnsupportedError, match="feature map"):
        Practise(steps=1).score(model, units, samples)
