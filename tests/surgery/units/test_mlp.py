"""MLP sublayers found, masked and cut in real architectures with random weights, and in corner cases."""

import pytest
import torch
from torch import nn

from families import FAMILIES_OF_IMAGES, FAMILIES_OF_TEXT, check_sublayers
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.surgery.units.mlp import Mlp
from ttmpd.testing.tiny_models import tiny_model, tiny_tokens, tiny_transformer

pytest.importorskip("timm")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", [*FAMILIES_OF_TEXT, *FAMILIES_OF_IMAGES])
def test_masked_equals_cut_in_every_family(name):
    n = {"mixer": 16, "convnext": 0}.get(name, 2)  # a block of ConvNeXt is a single branch, with a convolution in it
    assert len(check_sublayers(Mlp(), name)) == n


def test_an_mlp_lies_in_its_block_and_holds_its_neurons():
    units = find_units(tiny_transformer(), tiny_tokens(), ["block", "mlp", "neuron"]).units
    assert list(holders_of(units).items())[:3] == [
        ("blocks.0", ()),
        ("mlp:blocks.0.down", ("blocks.0",)),
        ("neuron:blocks.0.down", ("blocks.0", "mlp:blocks.0.down")),
    ]


class Net(nn.Module):
    """An MLP beside a shortcut; its hidden layer is read by a later sum, too, if ``also``."""

    def __init__(self, also: bool = False):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.also = also

    def forward(self, x):
        x = self.stem(x)
        hidden = self.up(x).relu()
        y = x + self.down(hidden)
        return self.head(y + hidden[..., :8] if self.also else y)


def test_layers_of_no_block_are_found():
    unit = Mlp().find(Net().eval(), torch.randn(3, 4)).units[0]
    assert (unit.id, unit.upstream, unit.branch) == ("mlp:down", (("up", "plain"),), True)


def test_an_mlp_whose_hidden_layer_something_else_reads_is_none():
    assert Mlp().find(Net(also=True).eval(), torch.randn(3, 4)).units == ()


def test_a_convolutional_block_is_none():
    assert Mlp().find(tiny_model(), torch.randn(2, 3, 8, 8)).units == ()
