"""Distance between probabilities and label: the samples on which the teacher is least confident."""

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.models.run import predictions_of
from ttmpd.select.base import Selector, error_norm, top_n


class EL2N(Selector):
    """The highest distances between probabilities and one-hot label."""

    source: ClassVar[str] = (
        "Paul et al., NeurIPS 2021 (arXiv 2107.07075), definition 2.2; one trained teacher, not the mean over ten "
        "networks early in training; without labels its answer is the label, so that doubt is ranked"
    )

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """Cost: one forward pass per sample."""
        return top_n(error_norm(predictions_of(teacher, pool, batch_size), labels), n)
