"""Stand-ins: what a removed unit did, as the best linear map of its input.

A stand-in answers ``phi(x + B [x 1])``, or ``phi(x + B [neighbourhood of x, 1])``: ridge least squares on the residual
branch, so that an infinite ridge is the identity (the dropped block), with the block's own final activation ``phi``
applied afterwards. All sums are float64.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ttmpd.least_squares import Moments
from ttmpd.records import Place, Unit


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A fitted stand-in: ``y = weight * x + bias``, a map of the channels at every position or a small convolution.

    Args:
        weight: (channels, channels), or (channels, channels, side, side).
        bias: (channels,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, unit: Unit, x: Tensor) -> Tensor:
        """The stand-in's answer for the unit's input, its activation included."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if unit.layout == "channels_last":
            y = F.linear(x, weight, bias)
        elif x.dim() == 4:
            kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
            y = F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)
        else:
            y = F.conv1d(x, weight[:, :, None], bias)
        return {"": y, "relu": y.relu(), "relu6": F.relu6(y)}[unit.activation] if unit.activation else y


@dataclass
class NormalEquations:
    """A stand-in as a weighted least-squares fit of ``y`` by ``[x 1]``, or by ``[neighbourhood of x, 1]``.

    Args:
        channels: of inputs and outputs.
        device: of the rows.
        side: of the kernel; a row holds ``side^2`` values per channel, the channel's own place in the middle.

    """

    channels: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    side: int = 1

    def __post_init__(self) -> None:
        self.moments = Moments(self.channels * self.side**2, self.channels, self.device)

    @property
    def middle(self) -> slice:
        """The columns of a row that hold the position itself."""
        return slice(self.side**2 // 2, self.channels * self.side**2, self.side**2)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: ``x`` is (rows, channels x side^2), ``y`` is (rows, channels), ``weight`` is (rows,)."""
        self.moments.add(x.to(self.moments.at).double(), y, weight)

    def pointwise(self) -> "NormalEquations":
        """The equations of the fit by ``[x 1]`` alone: a part of these."""
        part = NormalEquations(self.channels, self.device)
        part.moments = self.moments.part(torch.arange(self.moments.n_inputs)[self.middle])
        return part

    def solve(self, ridge: float) -> LinearMap:
        """The map that minimises the weighted squared error; the ridge draws it to handing on the input."""
        identity = torch.zeros(self.channels, self.moments.n_inputs)
        identity[:, self.middle] = torch.eye(self.channels)
        weight, bias = self.moments.solve(identity, torch.zeros(self.channels), ridge)
        assert bias is not None
        if self.side > 1:
            weight = weight.reshape(self.channels, self.channels, self.side, self.side)
        return LinearMap(weight, bias)


def rows(value: Tensor, unit: Place, index: Tensor, side: int = 1) -> Tensor:
    """The chosen positions of a batch as (B x positions, channels x side^2), zeros around the border."""
    index = index.to(value.device)
    if unit.layout == "channels_last":
        return value.reshape(len(value), -1, unit.channels)[:, index].reshape(-1, unit.channels)
    if side > 1:
        value, index = _neighbourhoods(value, index, side)
    return value.flatten(2)[:, :, index].transpose(1, 2).reshape(-1, unit.channels * side**2)


def _neighbourhoods(value: Tensor, index: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(B, channels x side^2, positions) around the positions at ``index``, and the index of all of them.

    Only what was chosen is copied: whole maps would be ``side^2`` times as large as the input.
    """
    width, reach = value.shape[3], side // 2
    padded = F.pad(value, (reach, reach, reach, reach))
    corner = index // width * padded.shape[3] + index % width
    steps = torch.arange(side, device=index.device)
    around = (steps[:, None] * padded.shape[3] + steps).flatten()
    found = padded.flatten(2)[:, :, corner[None] + around[:, None]]  # (B, channels, side^2, positions)
    return found.flatten(1, 2), torch.arange(len(index), device=index.device)
