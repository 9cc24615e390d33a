"""Stand-ins: what a removed unit did, as the best linear map of its input.

A stand-in answers ``phi(x + B [x 1])``, or ``phi(x + B [neighbourhood of x, 1])``: ridge least squares on the residual
branch, so that an infinite ridge is the identity (the dropped block), with the block's own final activation ``phi``
applied afterwards. All sums are float64.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttmpd.repair.least_squares import Moments
from ttmpd.surgery.replacements import LinearMap


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
