"""No opinion: the control that every scorer has to beat."""

from collections.abc import Iterable
from random import Random as Generator
from typing import ClassVar

from ttmpd.records import Score
from ttmpd.score.base import Job, Scorer


class Random(Scorer):
    """Uniform random harms."""

    source: ClassVar[str] = "control"

    def scores(self, job: Job) -> Iterable[Score]:
        """A harm from 0 to 1 per unit, by seed."""
        draw = Generator(job.seed)
        return (Score(unit.id, "drop", draw.random()) for unit in job.units)
