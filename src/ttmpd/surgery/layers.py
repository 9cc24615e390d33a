"""What units with members share: layers whose rows and columns are taken, masks, and the proof that both are one."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttmpd.models.modules import module_at
from ttmpd.models.run import OTHER_KERNELS, same_outputs
from ttmpd.records import WidthUnit

ROUND = 8
"""Widths are multiples of this where there are enough members: matrix units run them at full speed."""


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a matrix applied at every position: Linear, Hugging Face's Conv1D, a 1x1 convolution.

    Of convolutions along one axis or three those that also have no stride.
    """
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.padding == (0, 0)
    if isinstance(module, nn.Conv1d | nn.Conv3d):
        sizes = {*module.kernel_size, *module.stride, module.groups}
        return sizes == {1} and not any(module.padding)
    return isinstance(module, nn.Linear) or _transposed(module)


def n_axes(layer: nn.Module) -> int:
    """Axes behind the channels of what a convolution reads; 0 of a layer whose channels come last."""
    return len(layer.kernel_size) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a 2-D convolution from all channels to all channels, of any kernel and stride."""
    return isinstance(module, nn.Conv2d) and module.groups == 1


def answers_plainly(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """True if ``y`` is what the layer's weight and bias alone make of ``x``.

    Not where a subclass or a hook pads, scales or standardises, or adds a low-rank part (LoRA).
    """
    with torch.no_grad():
        plain = _product(layer, x)
    return plain is not None and same_outputs(plain, y, OTHER_KERNELS)


def _product(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The product of the layer's weight with its inputs, plus its bias; None where the padding is of another kind."""
    if isinstance(layer, nn.Conv2d) and kernel_area(layer) > 1:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        return nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    if isinstance(layer, nn.Conv2d):
        return nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride)
    axis = 1 if n_axes(layer) else -1
    return nn.functional.linear(x.movedim(axis, -1), matrix_of(layer), bias_of(layer)).movedim(-1, axis)


def kernel_area(layer: nn.Module) -> int:
    """Places under the kernel of a convolution; 1 of any other layer."""
    return math.prod(layer.kernel_size) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matrix_of(layer: nn.Module) -> Tensor:
    """The layer's weight as (outputs, inputs), to read: in some memory formats it is a copy."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if _transposed(layer) else weight.flatten(1)


def set_matrix(layer: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    """Give the layer a weight of (outputs, inputs) and a bias, in place; its sizes follow."""
    shaped = matrix.T if _transposed(layer) else matrix
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shaped = shaped.reshape(len(matrix), matrix.shape[1] // kernel_area(layer), *layer.kernel_size)
    _replace(layer, "weight", shaped)
    if bias is not None:
        _replace(layer, "bias", bias)
    n_out, n_in = matrix.shape[0], matrix.shape[1] // kernel_area(layer)
    for name, size in (("out_features", n_out), ("in_features", n_in), ("out_channels", n_out), ("in_channels", n_in),
                       ("nf", n_out), ("nx", n_in)):  # fmt: skip
        if hasattr(layer, name):
            setattr(layer, name, size)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Give the module a new parameter in the precision and memory format of its old one; one that was None begins."""
    old = getattr(module, name)
    like = old if isinstance(old, Tensor) else next(module.parameters())
    last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    memory = torch.channels_last if last and value.dim() == 4 else torch.contiguous_format
    value = value.detach().to(like.device, like.dtype).clone(memory_format=memory)
    setattr(module, name, nn.Parameter(value, like.requires_grad))


def take_inputs(layer: nn.Module, index: Tensor) -> None:
    """Keep the inputs at ``index``, in place."""
    set_matrix(layer, matrix_of(layer)[:, index.to(_device(layer))], None)


def take_outputs(layer: nn.Module, index: Tensor) -> None:
    """Keep the outputs at ``index``, in place: of a layer, of batch norm, or of a depthwise convolution."""
    index = index.to(_device(layer))
    if isinstance(layer, nn.BatchNorm2d):
        return _take_statistics(layer, index)
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    set_matrix(layer, matrix_of(layer)[index], None if bias is None else bias[index])
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        layer.groups = layer.in_channels = len(index)


def _take_statistics(norm: nn.BatchNorm2d, index: Tensor) -> None:
    for name in ("weight", "bias"):
        if isinstance(getattr(norm, name), Tensor):
            _replace(norm, name, getattr(norm, name)[index])
    for name in ("running_mean", "running_var"):
        if isinstance(getattr(norm, name), Tensor):
            setattr(norm, name, getattr(norm, name)[index].clone())
    norm.num_features = len(index)


def _device(layer: nn.Module) -> torch.device:
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def spread_out(kept_members: Sequence[int], width: int) -> Tensor:
    """The positions of the kept members where each is ``width`` wide."""
    return (torch.tensor(list(kept_members), dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()


def inputs_of(layer: nn.Module) -> int:
    """Features or channels that the layer reads at one place."""
    return matrix_of(layer).shape[1] // kernel_area(layer)


def columns(model: nn.Module, unit: WidthUnit, kept_members: Sequence[int]) -> Tensor:
    """What of that which the layer at ``unit.path`` reads belongs to the kept members."""
    return spread_out(kept_members, inputs_of(module_at(model, unit.path)) // unit.n_members)


def bias_of(layer: nn.Module) -> Tensor:
    """The layer's bias, zeros where it has none."""
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else matrix_of(layer).new_zeros(matrix_of(layer).shape[0])
