"""Random harms: the control that every scorer has to beat."""

from collections.abc import Iterable
from random import Random as Generator
from typing import ClassVar

import torch

from ttmpd.records import Scope, Score, WidthUnit
from ttmpd.score.base import Scorer, ScoringInputs, scores_by_importance


class Random(Scorer):
    """Uniform random harms."""

    source: ClassVar[str] = "control"

    scopes: ClassVar[tuple[Scope, ...]] = ("depth", "width")

    def scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        """A harm from 0 to 1 per unit, or per member, drawn by seed."""
        draw = Generator(inputs.seed)
        for unit in inputs.units:
            if isinstance(unit, WidthUnit):
                yield from scores_by_importance(unit, torch.tensor([draw.random() for _ in range(unit.n_members)]))
            else:
                yield Score(unit.id, "drop", draw.random())
