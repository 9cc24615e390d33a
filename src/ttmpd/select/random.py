"""Draw blindly: the control that every selector has to beat, and with a teacher often as good as any."""

from collections.abc import Iterable
from random import Random as Generator
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.select.base import Selector


class Random(Selector):
    """Uniform, without replacement."""

    source: ClassVar[str] = (
        "control; with soft labels of a teacher it is hard to beat (Ben-Baruch et al., ICML 2025, arXiv 2403.07854)"
    )
    uses_teacher: ClassVar[bool] = False

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """Drawn by seed; the teacher is not asked."""
        return Generator(seed).sample(range(len(pool)), n)
