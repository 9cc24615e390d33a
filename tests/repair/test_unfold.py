"""Rows of inputs and outputs at chosen positions."""

import pytest
import torch
from torch import nn

from ttmpd.repair.unfold import input_rows, rows


def test_rows_are_the_same_in_either_layout():
    value, index = torch.randn(2, 5, 3, 4), torch.tensor([0, 7, 11])
    first = rows(value, "channels_first", index)
    last = rows(value.permute(0, 2, 3, 1), "channels_last", index)
    assert torch.equal(first, last)
    assert torch.equal(first[1], value[0, :, 1, 3])
    assert first.shape == (6, 5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 2, 3, padding=1),
        nn.Conv2d(5, 2, 3, stride=2),
        nn.Conv2d(5, 2, (3, 5), stride=(2, 1), padding=(0, 2)),
        nn.Conv2d(5, 2, 3, padding=2, dilation=2),
        nn.Conv2d(5, 2, 1, stride=2),
    ],
)
def test_input_rows_of_a_convolution_are_the_values_under_its_kernel(layer):
    x = torch.randn(2, 5, 9, 11)
    output = layer(x)
    positions = torch.tensor([0, 3, output[0, 0].numel() - 1])
    product = input_rows(x, "channels_first", positions, layer) @ layer.weight.flatten(1).T + layer.bias
    assert torch.allclose(product, rows(output, "channels_first", positions), atol=1e-5)
