"""The best linear replacement of a removed block.

A linear replacement computes ``phi(W x + b)``: ridge least squares on the block's output, where an infinite ridge gives
the identity (the dropped block), with the block's own final activation ``phi`` applied afterwards. Sums are in float64.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttmpd.repair.least_squares import NormalEquations
from ttmpd.surgery.replacements import LinearMap


@dataclass
class ReplacementFit:
    """A linear replacement, fitted by weighted least squares of a block's outputs on its inputs.

    Args:
        channels: of inputs and outputs.
        device: of the rows.
    """

    channels: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.equations = NormalEquations(self.channels, self.channels, self.device)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: ``x`` and ``y`` are (rows, channels), ``weight`` is (rows,)."""
        self.equations.add(x.to(self.equations.sum_device).double(), y, weight)

    def solve(self, ridge: float) -> LinearMap:
        """The map with the least weighted squared error; the larger the ridge, the closer it is to the identity."""
        weight, bias = self.equations.solve(torch.eye(self.channels), torch.zeros(self.channels), ridge)
        assert bias is not None
        return LinearMap(weight, bias)
