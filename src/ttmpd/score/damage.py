"""Raw damage: how far the final features move when a unit is dropped, with nothing repaired."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ttmpd.method import check_range
from ttmpd.records import DEFAULT_ACTIONS, Action, Samples, Score, Unit
from ttmpd.score.base import Scorer
from ttmpd.tails import distances, teacher_tails


class Damage(Scorer):
    """Relative squared change of the final features when a unit is dropped."""

    source: ClassVar[str] = "variable 1 of TT-MPD alone (arXiv 2412.07114); PRACTISE without adaptors"
    max_samples: int = 128
    """Samples that are run; the distances are means over many features and settle early."""

    def __post_init__(self) -> None:
        check_range("damage.max_samples", self.max_samples, 1)

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
        """One score per unit for the action "drop".

        Cost: one teacher pass and one run of the layers behind each unit, over at most ``max_samples`` samples.
        """
        few = samples.subset(range(min(len(samples), self.max_samples)))
        found = teacher_tails(teacher, units, few, lambda _unit: {"drop": lambda x: x}, batch_size=batch_size)
        return tuple(
            Score(unit.id, "drop", distances(found[unit.id, "drop"]), found[unit.id, "drop"]) for unit in units
        )
