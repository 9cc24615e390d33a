"""Small networks of residual and plain blocks."""

import torch
from torch import nn

from ttmpd.surgery.units.block import Block

BLOCK = Block()


def image(size: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def paths(model: nn.Module, batch: torch.Tensor) -> list[str]:
    return [unit.path for unit in BLOCK.find(model.eval(), batch).units]


# --- hand-written cases


class Res(nn.Module):
    """x + layer(x)"""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.layer(x)


class Plain(Res):
    """layer(x)"""

    def forward(self, x):
        return self.layer(x)


class Net(nn.Module):
    """stem, body, head; ``run`` says how the body is run."""

    def __init__(self, *body: nn.Module, width: int = 6, run=None) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(5, width), nn.Sequential(*body), nn.Linear(width, 3)
        self.run = run

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.body(x) if self.run is None else self.run(self.body, x))


ROWS = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
