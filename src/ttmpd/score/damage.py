"""Raw damage: how far the final features move when a unit is dropped, with nothing repaired."""

import functools
from collections.abc import Iterable
from typing import ClassVar

from ttmpd.method import check_fields
from ttmpd.quality.damage import feature_damage, replacement_damage
from ttmpd.records import Score
from ttmpd.score.base import Scorer, ScoringInputs
from ttmpd.surgery.replacements import dropped


class Damage(Scorer):
    """Relative squared change of the final features when a unit is dropped."""

    source: ClassVar[str] = "variable 1 of TT-MPD alone (arXiv 2412.07114); PRACTISE without adaptors"
    max_samples: int = 128
    """Samples that are run; the distances are means over many features and settle early."""

    def __post_init__(self) -> None:
        check_fields(self, max_samples=1)

    def scores(self, job: ScoringInputs) -> Iterable[Score]:
        """One score per unit for the action "drop".

        Cost: one teacher pass and one run of the layers behind each unit, over at most ``max_samples`` samples.
        """
        few = job.samples.first(self.max_samples)
        holders = [unit for unit in job.depth_units if not unit.branch]
        for units in (holders, [unit for unit in job.depth_units if unit.branch]):
            damages = replacement_damage(
                job.teacher,
                units,
                few,
                lambda unit: {"drop": functools.partial(dropped, unit)},
                batch_size=job.batch_size,
                wholes=holders,
            )
            for unit in units:
                parts = damages[unit.id, "drop"]
                yield Score(unit.id, "drop", feature_damage(parts), parts)
