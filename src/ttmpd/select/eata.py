"""Keep samples of which the teacher is sure and that are unlike those kept before."""

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
    """Entropy below e0 ln(classes) and answers unlike the moving average of those kept, as the pool streams by."""

    source: ClassVar[str] = (
        "EATA (Niu et al., ICML 2022, arXiv 2204.02610), equations 3 to 6; the teacher stays as it is; the first n "
        "that pass are taken, and where fewer pass the surest of the rest"
    )
    e0: float = 0.4
    """Largest entropy of a reliable answer, as a share of ln(number of classes)."""
    redundancy: float = 0.0
    """The cosine to the moving average must be smaller in size; 0: by the number of classes."""
    window: int = 64
    """Samples between two updates of the moving average."""

    def __post_init__(self) -> None:
        check_fields(self, e0=(0.0, 1.0), redundancy=0.0, window=1)

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """The pool streams by in an order drawn by seed. Labels are not used.

        Cost: one forward pass per sample.
        """
        logits = predictions_of(teacher, pool, batch_size)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        passed = self._passing(logits[order].float().softmax(-1), n)
        chosen: list[int] = order[passed].tolist()
        surest = top_n(-entropy(logits), len(pool))
        return list(dict.fromkeys(chosen + surest))[:n]

    def _passing(self, probabilities: Tensor, n: int) -> Tensor:
        """Positions of the first ``n`` rows that are reliable and not redundant, or of fewer."""
        n_classes = probabilities.shape[-1]
        selection = ReliableSampleFilter(self.e0 * math.log(n_classes), self.redundancy or redundancy_for(n_classes))
        found = [torch.empty(0, dtype=torch.long)]
        for start in range(0, len(probabilities), self.window):
            found.append(start + selection.choose(probabilities[start : start + self.window]))
            if sum(map(len, found)) >= n:
                break
        return torch.cat(found)[:n]
