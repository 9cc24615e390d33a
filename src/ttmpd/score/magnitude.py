"""Small weights hurt little: the oldest criterion, for whole blocks."""

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from ttmpd.modules import module_at
from ttmpd.records import Score
from ttmpd.score.base import Job, Scorer


class Magnitude(Scorer):
    """Mean absolute weight of a unit, its vectors (norms, biases) left out."""

    source: ClassVar[str] = "L1 norm of weights (Li et al., 2017, arXiv 1608.08710), averaged over a block"

    def scores(self, job: Job) -> Iterable[Score]:
        """The mean absolute value of all weights with two or more axes; of all weights where there are none."""
        return (Score(unit.id, "drop", _mean_magnitude(module_at(job.teacher, unit.path))) for unit in job.units)


def _mean_magnitude(module: nn.Module) -> float:
    weights = [p.detach() for p in module.parameters()]
    matrices = [p for p in weights if p.dim() >= 2] or weights
    total = sum(float(p.abs().sum()) for p in matrices)
    return total / max(1, sum(p.numel() for p in matrices))
