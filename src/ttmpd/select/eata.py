"""Choose samples on which the teacher is confident and that differ from those chosen before."""

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.method import check_fields
from ttmpd.models.run import predictions_of
from ttmpd.select.base import Selector, top_n
from ttmpd.training.losses import entropy
from ttmpd.training.test_time import ReliableSampleFilter, redundancy_for


class Reliable(Selector):
    """Entropy below e0 ln(classes) and a prediction unlike the moving average of those chosen before."""

    source: ClassVar[str] = (
        "EATA (Niu et al., ICML 2022, arXiv 2204.02610), equations 3 to 6; the teacher stays as it is; the first n "
        "that pass are taken, and where fewer pass the surest of the rest"
    )
    e0: float = 0.4
    """Largest entropy of a reliable prediction, as a share of ln(number of classes)."""
    redundancy: float = 0.0
    """Largest absolute cosine to the moving average; 0: set by the number of classes."""
    window: int = 64
    """Samples between two updates of the moving average."""

    def __post_init__(self) -> None:
        check_fields(self, e0=(0.0, 1.0), redundancy=0.0, window=1)

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """The samples are judged in an order drawn by seed. Labels are not used.

        Cost: one forward pass per sample.
        """
        logits = predictions_of(teacher, pool, batch_size)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        passed = self._passing(logits[order].float().softmax(-1), n)
        chosen: list[int] = order[passed].tolist()
        most_confident = top_n(-entropy(logits), len(pool))
        return list(dict.fromkeys(chosen + most_confident))[:n]

    def _passing(self, probabilities: Tensor, n: int) -> Tensor:
        """Positions of the first ``n`` rows that are reliable and not redundant, or of fewer."""
        n_classes = probabilities.shape[-1]
        selection = ReliableSampleFilter(self.e0 * math.log(n_classes), self.redundancy or redundancy_for(n_classes))
        positions = [torch.empty(0, dtype=torch.long)]
        for start in range(0, len(probabilities), self.window):
            positions.append(start + selection.choose(probabilities[start : start + self.window]))
            if sum(map(len, positions)) >= n:
                break
        return torch.cat(positions)[:n]
