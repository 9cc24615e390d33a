"""Hidden channels of convolutional blocks, found by what feeds a convolution: another one, channel by channel."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.method import check_fields
from ttmpd.models.modules import module_at
from ttmpd.models.tiny import tiny_model
from ttmpd.records import WidthUnit
from ttmpd.surgery.graph import Call, calls_of, producers_of
from ttmpd.surgery.layers import (
    ROUND,
    is_convolution,
    is_layer,
    kernel_area,
    matrix_of,
    spread_out,
    take_inputs,
    take_outputs,
)
from ttmpd.surgery.masks import proven
from ttmpd.surgery.observation import Observation
from ttmpd.surgery.units.base import UnitSearch, WidthUnits

_CHANNELWISE = {
    "Relu", "Hardtanh", "LeakyRelu", "Elu", "Gelu", "Silu", "Hardswish", "Mish", "Tanh", "Sigmoid", "Hardsigmoid",
    "Softplus", "Mul", "Div", "Clone", "ToCopy", "Alias", "Contiguous", "NativeDropout", "MaxPool2DWithIndices",
    "AvgPool2D", "ConstantPadNd", "UpsampleNearest2D", "UpsampleBilinear2D",
}  # fmt: skip


class Channel(WidthUnits):
    """Hidden channels that one convolution makes and another one reads, alone.

    Between the two may stand batch norm, depthwise convolutions, pooling and element-wise functions. Channels of the
    residual stream, which many layers read and write, and those behind squeeze and excitation stay.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> net = resnet18().eval()
        >>> unit = Channel().find(net, torch.zeros(1, 3, 64, 64)).units[0]
        >>> unit.path, unit.n_members, unit.producers
        ('layer1.0.conv2', 64, ('layer1.0.conv1', 'layer1.0.bn1'))
    """

    source: ClassVar[str] = "filter pruning (Li et al., 2017; He et al., 2017); found here in the autograd graph"
    least: int = 16
    """Convolutions with fewer hidden channels are left alone."""
    parts: int = 8
    """Into how many widths a hidden layer is divided."""

    def __post_init__(self) -> None:
        check_fields(self, least=2, parts=2)

    def search(self, observation: Observation) -> UnitSearch:
        """The hidden channels of at least ``least``, in the order of the network."""
        model = observation.model
        calls = calls_of(observation, lambda module: is_convolution(module) or _is_channelwise(module))
        made_by = {path: _makers(model, path, calls) for path, call in calls.items() if call.plain}
        shared = [maker for makers in made_by.values() for maker in makers]
        wide = [
            path for path, makers in made_by.items()
            if makers and calls[path].inputs[0] >= self.least and all(shared.count(maker) == 1 for maker in makers)
        ]  # fmt: skip
        units = [self._sized(_unit(model, path, made_by[path], calls, observation.macs)) for path in wide]
        removable, refused = proven(self.narrow, model, units, observation.batch[:2])
        return UnitSearch(tuple(removable), refused)

    def _sized(self, unit: WidthUnit) -> WidthUnit:
        """With equal steps down to the last one, in multiples of 8: kernels run other numbers of channels no faster."""
        shares = (unit.n_members * (self.parts - i) / self.parts for i in range(1, self.parts))
        counts = (max(ROUND, round(share / ROUND) * ROUND) for share in shares)
        return dataclasses.replace(unit, widths=tuple(dict.fromkeys(n for n in counts if n < unit.n_members)))

    def example(self, n: int = 4) -> tuple[nn.Module, Tensor]:
        """Three residual blocks with hidden channels, and images for them."""
        return tiny_model(hidden=24), torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def narrow(self, student: nn.Module, unit: WidthUnit, kept_members: Sequence[int]) -> None:
        """Rows of what makes the channels and works on each alone, columns of the convolution behind."""
        for path in unit.producers:
            take_outputs(module_at(student, path), spread_out(kept_members, 1))
        reader = module_at(student, unit.path)
        take_inputs(reader, spread_out(kept_members, kernel_area(reader)))


def _is_channelwise(module: nn.Module) -> bool:
    """Whether the module has weights and treats every channel alone: batch norm, or a depthwise convolution."""
    if isinstance(module, nn.Conv2d):
        return 1 < module.groups == module.in_channels == module.out_channels
    return isinstance(module, nn.BatchNorm2d)


def _makers(model: nn.Module, path: str, calls: dict[str, Call]) -> tuple[str, ...]:
    """The convolutions whose outputs, channel by channel, become the input, and all that works on these in between.

    () where anything else enters, or where two 1x1 convolutions have only functions in between: those are neurons.
    """
    makers, _ = producers_of(path, calls, _CHANNELWISE, through=lambda name: _is_channelwise(module_at(model, name)))
    modules = [module_at(model, name) for name in makers]
    right = all(calls[name].outputs[:1] == calls[path].inputs[:1] for name in makers)
    neurons = all(is_layer(module) for module in (module_at(model, path), *modules))
    return makers if right and any(map(is_convolution, modules)) and not neurons else ()


def _unit(
    model: nn.Module, path: str, makers: tuple[str, ...], calls: dict[str, Call], macs: dict[str, int]
) -> WidthUnit:
    layer = module_at(model, path)
    parameters = [parameter for name in makers for parameter in module_at(model, name).parameters()]
    return WidthUnit(
        kind="channel",
        path=path,
        module=type(layer).__name__,
        shape=calls[path].outputs,
        layout="channels_first",
        n_params=sum(parameter.numel() for parameter in parameters) + matrix_of(layer).numel(),
        macs=sum(macs.get(name, 0) for name in (path, *makers)),
        n_members=calls[path].inputs[0],
        consumers=(path,),
        producers=makers,
    )
