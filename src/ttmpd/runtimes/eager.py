"""PyTorch as it is, layer by layer."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttmpd.runtimes.base import Runtime


class Eager(Runtime):
    """PyTorch runs the model layer by layer; nothing is compiled.

    Example:
        >>> Eager().prepare(nn.Flatten(), torch.zeros(2, 3, 4))(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 12])
    """

    source: ClassVar[str] = "PyTorch"

    @property
    def version(self) -> str:
        """Version of PyTorch, with the build that was installed."""
        return str(torch.__version__)

    def prepare(self, module: nn.Module, batch: Tensor) -> Callable[[Tensor], Any]:
        """The module itself.

        Args:
            module: see :meth:`ttmpd.runtimes.base.Runtime.prepare`.
            batch: not looked at.
        """
        return module
