"""The contract of a scorer."""

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.method import Method
from ttmpd.records import ACTIONS, Action, DepthUnit, RefitScope, Removal, Scope, Score, Unit, WidthUnit


@dataclass(frozen=True, slots=True, eq=False)
class ScoringInputs:
    """The arguments of :meth:`Scorer.score`, as a scorer gets them; there is at least one unit."""

    teacher: nn.Module
    units: Sequence[Unit]
    samples: Samples
    actions: Sequence[Action]
    batch_size: int
    seed: int

    @property
    def device(self) -> torch.device:
        """The device of the teacher."""
        return next(self.teacher.parameters()).device

    @property
    def depth_units(self) -> list[DepthUnit]:
        """The units that are removed as a whole."""
        return [unit for unit in self.units if isinstance(unit, DepthUnit)]

    @property
    def width_units(self) -> list[WidthUnit]:
        """The units of which members are removed."""
        return [unit for unit in self.units if isinstance(unit, WidthUnit)]


class Scorer(Method, abc.ABC):
    """Predicts, for every unit and action, how much the removal would hurt after recovery; higher hurts more."""

    actions: ClassVar[tuple[Action, ...]] = ("drop",)
    """The actions it distinguishes. A planner offers no others."""
    scopes: ClassVar[tuple[Scope, ...]] = ("depth",)
    """Units that it can score: those removed as a whole ("depth"), member by member ("width"), or both."""
    refit_scope: ClassVar[RefitScope] = "all_later_layers"
    """Which layers are fitted in the students of its plans, see :func:`ttmpd.repair.sequential.repaired`."""
    scores_plans: ClassVar[bool] = False
    """True if :meth:`score_plan` can score a plan as a whole; otherwise the harms of its removals are added up."""

    def can_judge(self, model: nn.Module, unit: Unit) -> bool:
        """True if the method can score this unit of the model; others are not offered to a planner."""
        del model
        return ("width" if isinstance(unit, WidthUnit) else "depth") in self.scopes

    def score(
        self,
        teacher: nn.Module,
        units: Sequence[Unit],
        samples: Samples,
        *,
        actions: Sequence[Action] = ACTIONS,
        batch_size: int = 64,
        seed: int = 0,
    ) -> tuple[Score, ...]:
        """One score per unit and action, in the order of ``units``; for width units one per width.

        Args:
            teacher: the original model, on the device where it shall run; left untouched.
            units: that can be removed.
            samples: unlabelled samples from the place of use.
            actions: that may be planned; others need no score.
            batch_size: samples per forward pass.
            seed: of everything random.

        Raises:
            UnsupportedError: the method cannot treat this model or a unit.

        Example:
            >>> from ttmpd.score.magnitude import Magnitude
            >>> from ttmpd.surgery.find import find_units
            >>> from ttmpd.testing.tiny_models import tiny_model, tiny_samples
            >>> model, samples = tiny_model(), tiny_samples(8)
            >>> units = find_units(model, samples.batch(slice(0, 2)), ["block"]).units
            >>> [(score.unit_id, score.action) for score in Magnitude().score(model, units, samples)][0]
            ('block:blocks.0', 'drop')
        """
        return tuple(self.scores(ScoringInputs(teacher, units, samples, actions, batch_size, seed))) if units else ()

    def score_plan(self, inputs: ScoringInputs, removals: Sequence[Removal]) -> float:
        """The harm of a whole plan, on the scale of the scores, for a scorer that ``scores_plans``.

        Args:
            inputs: as for :meth:`scores`; the units do not matter.
            removals: in the order of the network.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        """Yield the scores that :meth:`score` returns."""


def scores_by_importance(unit: WidthUnit, importance: Tensor) -> Iterable[Score]:
    """One score per width: the most important members stay, and the harm is the summed importance of the others.

    Args:
        unit: with members.
        importance: (members,), none below zero.
    """
    order = importance.argsort(descending=True, stable=True)
    for width in unit.widths:
        members, removed = order[:width].sort().values, order[width:]
        yield Score(unit.id, "narrow", float(importance[removed].sum()), kept=tuple(members.tolist()))
