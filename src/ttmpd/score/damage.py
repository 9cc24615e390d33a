"""Raw damage: how far the final features move when a unit is dropped, with nothing repaired."""

import functools
from collections.abc import Iterable
from typing import ClassVar

from ttmpd.method import check_fields
from ttmpd.quality.damage import replacement_damage
from ttmpd.records import Score
from ttmpd.score.base import Scorer, ScoringInputs
from ttmpd.surgery.replacements import dropped


class Damage(Scorer):
    """Relative squared change of the final features when a unit is dropped."""

    source: ClassVar[str] = "variable 1 of TT-MPD alone (arXiv 2412.07114); PRACTISE without adaptors"
    max_samples: int = 128
    """Samples that are run; the damage is a mean over many features and settles early."""

    def __post_init__(self) -> None:
        check_fields(self, max_samples=1)

    def scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        """One score per unit for the action "drop".

        Cost: one teacher pass over at most ``max_samples`` samples for blocks and one for branches of them, and one run
        of the later layers for each unit.
        """
        samples = inputs.samples.first(self.max_samples)
        blocks = [unit for unit in inputs.depth_units if not unit.branch]
        for units in (blocks, [unit for unit in inputs.depth_units if unit.branch]):
            damages = replacement_damage(
                inputs.teacher,
                units,
                samples,
                lambda unit: {"drop": functools.partial(dropped, unit)},
                batch_size=inputs.batch_size,
                containers=blocks,
            )
            for unit in units:
                yield Score(unit.id, "drop", damages[unit.id, "drop"])
