"""Stand-ins: what a removed unit did, as the best linear map of its input.

A stand-in answers ``phi(x + B [x 1])``: ridge least squares on the residual branch, so that an infinite ridge is the
identity (the dropped block), with the block's own final activation ``phi`` applied afterwards. All sums are float64.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttmpd.repair.least_squares import NormalEquations
from ttmpd.surgery.replacements import LinearMap


@dataclass
class ReplacementFit:
    """A stand-in as a weighted least-squares fit of ``y`` by ``[x 1]``.

    Args:
        channels: of inputs and outputs.
        device: of the rows.
    """

    channels: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.moments = NormalEquations(self.channels, self.channels, self.device)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: ``x`` and ``y`` are (rows, channels), ``weight`` is (rows,)."""
        self.moments.add(x.to(self.moments.at).double(), y, weight)

    def solve(self, ridge: float) -> LinearMap:
        """The map that minimises the weighted squared error; the ridge draws it to handing on the input."""
        weight, bias = self.moments.solve(torch.eye(self.channels), torch.zeros(self.channels), ridge)
        assert bias is not None
        return LinearMap(weight, bias)
