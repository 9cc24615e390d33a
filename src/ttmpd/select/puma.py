"""Choose the samples near a decision boundary; those far from any teach little."""

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.quality.margins import DeepFoolConfig, margins
from ttmpd.select.base import Selector, top_n


class PUMA(Selector):
    """The lowest margins, by DeepFool on the teacher, in pixel units; the highest are pruned."""

    source: ClassVar[str] = (
        "PUMA (Maroto and Frossard, 2024, arXiv 2405.06298), margins by DeepFool (arXiv 1511.04599); the teacher is "
        "not trained against attacks, and without labels its answer is the label; the radii of attacks "
        "(`ttmpd.quality.margins.radii`) play no part"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    norm: str = "linf"
    """Norm in which margins are measured: linf or l2."""
    max_iter: int = 50
    overshoot: float = 0.02
    classes: int = 10
    """Boundaries to this many likeliest classes are compared, the sample's own counted."""

    def __post_init__(self) -> None:
        self._search()  # checks the fields

    def _search(self) -> DeepFoolConfig:
        return DeepFoolConfig(norm=self.norm, max_iter=self.max_iter, overshoot=self.overshoot, classes=self.classes)

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """Cost: per sample and iteration two forward and ``classes - 1`` backward passes, see :func:`margins`.

        Raises:
            UnsupportedError: the teacher's answers cannot be differentiated by its inputs.
        """
        return top_n(-margins(teacher, pool, self._search(), labels=labels, batch_size=batch_size), n)
