"""Attention sublayers found, masked and cut in real architectures with random weights, and in corner cases."""

import pytest
import torch
from torch import nn

from families import FAMILIES_OF_IMAGES, FAMILIES_OF_TEXT, check_sublayers
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.surgery.units.attention import Attention
from ttmpd.testing.tiny_models import tiny_tokens, tiny_transformer

pytest.importorskip("timm")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", [*FAMILIES_OF_TEXT, *FAMILIES_OF_IMAGES])
def test_masked_equals_cut_in_every_family(name):
    assert len(check_sublayers(Attention(), name)) == (0 if name in ("mixer", "convnext") else 2)


def test_an_attention_lies_in_its_block_and_holds_its_heads():
    units = find_units(tiny_transformer(), tiny_tokens(), ["block", "attention", "head"]).units
    assert list(holders_of(units).items())[:3] == [
        ("blocks.0", ()),
        ("attention:blocks.0.attention", ("blocks.0",)),
        ("head:blocks.0.attention.proj", ("blocks.0", "attention:blocks.0.attention")),
    ]


class Attending(nn.Module):
    """Attention of torch's own beside a shortcut that is read by ``also``, too."""

    def __init__(self, also: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.also = nn.Linear(8, 3), also

    def forward(self, x):
        normed = self.norm(x)
        branch = self.attention(normed, normed, normed, need_weights=False)[0]
        x = x + branch
        return self.head((x + normed if self.also else x).mean(1))


@pytest.mark.parametrize(("also", "n_params"), [(False, 304), (True, 288)])
def test_a_norm_goes_with_its_attention_where_nothing_else_reads_it(also, n_params):
    units = Attention().find(Attending(also).eval(), torch.randn(2, 4, 8)).units
    assert [(unit.path, unit.n_params) for unit in units] == [("attention", n_params)]
