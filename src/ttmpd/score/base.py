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
    """What a scorer is asked: the arguments of :meth:`Scorer.score`; there is at least one unit."""

    teacher: nn.Module
    units: Sequence[Unit]
    samples: Samples
    actions: Sequence[Action]
    batch_size: int
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return next(self.teacher.parameters()).device

    @property
    def depth_units(self) -> list[DepthUnit]:
        """Those of the units that go as a whole."""
        return [unit for unit in self.units if isinstance(unit, DepthUnit)]

    @property
    def width_units(self) -> list[WidthUnit]:
        """Those of the units that go member by member."""
        return [unit for unit in self.units if isinstance(unit, WidthUnit)]


class Scorer(Method, abc.ABC):
    """Predicts, for every unit and action, how much the removal would hurt after recovery; higher hurts more."""

    actions: ClassVar[tuple[Action, ...]] = ("drop",)
    """The actions it tells apart. A planner offers no others."""
    scopes: ClassVar[tuple[Scope, ...]] = ("depth",)
    """Whether it judges units that go as a whole, member by member (see :func:`narrowed`), or both."""
    refit_scope: ClassVar[RefitScope] = "all_later_layers"
    """What is fitted again in the students of its plans, see :func:`ttmpd.repair.sequential.repaired`."""
    scores_plans: ClassVar[bool] = False
    """Whether :meth:`score_plan` says what a plan as a whole would do; else the harms of its removals are added up."""

    def can_judge(self, model: nn.Module, unit: Unit) -> bool:
        """Whether the method can treat this unit of the model; others are not offered to a planner."""
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
        """One score per unit and action, in the order of ``units``.

        Args:
            teacher: the model as found, on the device where it shall run; left untouched.
            units: what can be removed.
            samples: unlabelled samples from the place of use.
            actions: what may be planned; others need no score.
            batch_size: samples per forward pass.
            seed: of everything random.

        Raises:
            UnsupportedError: the method cannot treat this model or a unit.
        """
        return tuple(self.scores(ScoringInputs(teacher, units, samples, actions, batch_size, seed))) if units else ()

    def score_plan(self, job: ScoringInputs, removals: Sequence[Removal]) -> float:
        """The harm of a whole plan, in the scale of the scores, where the scorer ``scores_plans``.

        Args:
            job: as for :meth:`scores`; its units do not matter.
            removals: in the order of the network.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def scores(self, job: ScoringInputs) -> Iterable[Score]:
        """The scores of :meth:`score`."""


def narrowed(unit: WidthUnit, importance: Tensor) -> Iterable[Score]:
    """One score per width: the most important members stay, the harm is the sum over the others.

    Args:
        unit: with members.
        importance: (members,), none below zero.
    """
    order = importance.argsort(descending=True, stable=True)
    for width in unit.widths:
        kept, gone = order[:width].sort().values, order[width:]
        yield Score(unit.id, "narrow", float(importance[gone].sum()), kept=tuple(kept.tolist()))
