"""Inputs of layers as rows of a matrix."""

import math

import torch
from torch import Tensor, nn

from ttmpd.records import Location
from ttmpd.surgery.layers import kernel_area


def input_rows(value: Tensor, unit: Location, index: Tensor, layer: nn.Module) -> Tensor:
    """What the layer at ``unit.path`` reads for the chosen positions of its output: (B x positions, inputs).

    The inputs of a convolution are all values under its kernel, channel by channel.
    """
    index = index.to(value.device)
    if isinstance(layer, nn.Conv2d) and (kernel_area(layer) > 1 or max(layer.stride) > 1):
        return under_kernel(value, index, layer).transpose(1, 2).flatten(0, 1)
    if unit.layout == "channels_first":
        return value.flatten(2)[:, :, index].transpose(1, 2).flatten(0, 1)
    shape = (len(value), math.prod(value.shape[1:-1]), value.shape[-1])  # the width may be zero
    return value.reshape(shape)[:, index].flatten(0, 1)


def under_kernel(value: Tensor, index: Tensor, layer: nn.Conv2d) -> Tensor:
    """(B, channels x places under the kernel, positions) of the input at flat positions of the output.

    Only what was chosen is copied: whole maps would be as many times as large as there are places under the kernel.
    """
    assert not isinstance(layer.padding, str)
    (high, wide), (down, across) = layer.padding, layer.stride
    padded = nn.functional.pad(value, (wide, wide, high, high))
    width = padded.shape[3]
    columns = (width - layer.dilation[1] * (layer.kernel_size[1] - 1) - 1) // across + 1
    corner = index // columns * down * width + index % columns * across
    rows, places = (torch.arange(n, device=index.device) for n in layer.kernel_size)
    around = (rows[:, None] * (layer.dilation[0] * width) + places * layer.dilation[1]).flatten()
    return padded.flatten(2)[:, :, corner[None] + around[:, None]].flatten(1, 2)


def rows(value: Tensor, unit: Location, index: Tensor) -> Tensor:
    """The chosen positions of a batch as (B x positions, channels)."""
    index = index.to(value.device)
    if unit.layout == "channels_last":
        return value.reshape(len(value), -1, unit.channels)[:, index].reshape(-1, unit.channels)
    return value.flatten(2)[:, :, index].transpose(1, 2).reshape(-1, unit.channels)
