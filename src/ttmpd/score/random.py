"""No opinion: the control that every scorer has to beat."""

from collections.abc import Sequence
from random import Random as Generator
from typing import ClassVar

from torch import nn

from ttmpd.records import DEFAULT_ACTIONS, Action, Samples, Score, Unit
from ttmpd.score.base import Scorer


class Random(Scorer):
    """Uniform random harms."""

    source: ClassVar[str] = "control"

    def score(
        self,
        teacher: nn.Module,
        units: Sequence[Unit],
        samples: Samples,
        *,
        actions: Sequence[Action] = DEFAULT_ACTIONS,
        batch_size: int = 64,
        seed: int = 0,
    ) -> tuple[Score, ...]:
        """A harm from 0 to 1 per unit, by seed."""
        draw = Generator(seed)
        return tuple(Score(unit.id, "drop", draw.random()) for unit in units)
