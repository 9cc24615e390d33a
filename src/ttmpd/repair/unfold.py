"""Inputs and outputs of layers as rows of a matrix, at chosen positions."""

import math

import torch
from torch import Tensor, nn

from ttmpd.records import Layout
from ttmpd.surgery.layers import kernel_area


def rows(value: Tensor, layout: Layout, positions: Tensor) -> Tensor:
    """The vectors at the given flat positions of a batch of feature maps or token sequences.

    Args:
        value: (B, channels, ...) or (B, ..., channels).
        layout: which axis holds the channels.
        positions: (P,) numbers of pixels or tokens.

    Returns:
        (B x P, channels), sample by sample.
    """
    positions = positions.to(value.device)
    if layout == "channels_first":
        return value.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)
    shape = (len(value), math.prod(value.shape[1:-1]), value.shape[-1])  # the width may be zero
    return value.reshape(shape)[:, positions].flatten(0, 1)


def input_rows(value: Tensor, layout: Layout, positions: Tensor, layer: nn.Module) -> Tensor:
    """The inputs from which a layer computes its output at the given positions.

    For a convolution these are all values under its kernel, channel by channel; for every other layer those at the
    position itself.

    Args:
        value: a batch of the layer's inputs.
        layout: which axis holds the channels.
        positions: (P,) flat positions of the layer's output.
        layer: that reads ``value``.

    Returns:
        (B x P, inputs), sample by sample.
    """
    if isinstance(layer, nn.Conv2d) and (kernel_area(layer) > 1 or max(layer.stride) > 1):
        return _under_kernel(value, positions.to(value.device), layer).transpose(1, 2).flatten(0, 1)
    return rows(value, layout, positions)


def _under_kernel(value: Tensor, positions: Tensor, layer: nn.Conv2d) -> Tensor:
    """(B, channels x kernel area, P) input values under the kernel at flat positions of the output.

    Unlike ``F.unfold`` this copies the chosen positions alone; whole maps would take kernel-area times the memory.
    """
    assert not isinstance(layer.padding, str)
    (pad_rows, pad_columns), (row_stride, column_stride) = layer.padding, layer.stride
    padded = nn.functional.pad(value, (pad_columns, pad_columns, pad_rows, pad_rows))
    width = padded.shape[3]
    n_columns = (width - layer.dilation[1] * (layer.kernel_size[1] - 1) - 1) // column_stride + 1
    corner = positions // n_columns * row_stride * width + positions % n_columns * column_stride
    kernel_rows, kernel_columns = (torch.arange(n, device=positions.device) for n in layer.kernel_size)
    offsets = (kernel_rows[:, None] * (layer.dilation[0] * width) + kernel_columns * layer.dilation[1]).flatten()
    return padded.flatten(2)[:, :, corner[None] + offsets[:, None]].flatten(1, 2)
