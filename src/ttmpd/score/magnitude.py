"""Magnitude of weights: removing small weights hurts little."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import nn

from ttmpd.models.modules import module_at
from ttmpd.records import Scope, Score, WidthUnit
from ttmpd.score.base import Scorer, ScoringInputs, scores_by_importance
from ttmpd.surgery.layers import matrix_of


class Magnitude(Scorer):
    """Mean absolute weight of a unit, without its vectors (norms, biases)."""

    source: ClassVar[str] = "L1 norm of weights (Li et al., 2017, arXiv 1608.08710), averaged over a block"

    scopes: ClassVar[tuple[Scope, ...]] = ("depth", "width")

    def scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        """Mean absolute value of all weights with two or more axes, or of all weights where there are none.

        A member is scored by the norm of the weights that read it, over the mean norm in its layer.
        """
        for unit in inputs.units:
            module = module_at(inputs.teacher, unit.path)
            if isinstance(unit, WidthUnit):
                parts = (
                    matrix_of(module).detach().view(-1, unit.n_members, matrix_of(module).shape[1] // unit.n_members)
                )
                norms = parts.square().sum((0, 2)).sqrt()
                yield from scores_by_importance(unit, norms / norms.mean().clamp_min(1e-12))
            else:
                yield Score(unit.id, "drop", _mean_magnitude([module_at(inputs.teacher, path) for path in unit.paths]))


def _mean_magnitude(modules: Sequence[nn.Module]) -> float:
    weights = [p.detach() for module in modules for p in module.parameters()]
    matrices = [p for p in weights if p.dim() >= 2] or weights
    total = sum(float(p.abs().sum()) for p in matrices)
    return total / max(1, sum(p.numel() for p in matrices))
