"""The contract of a kind of unit."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.errors import UnsupportedError
from ttmpd.method import Method
from ttmpd.records import Action, DepthUnit, Unit, WidthUnit
from ttmpd.surgery.observation import Observation
from ttmpd.surgery.reasons import Refusal
from ttmpd.surgery.replacements import copied_without, drop


@dataclass(frozen=True, slots=True)
class UnitSearch:
    """What was found in a model.

    Args:
        units: removable, in the order in which the network runs them.
        not_removable: path -> why a part that looks like a unit is none.
    """

    units: tuple[Unit, ...]
    not_removable: Mapping[str, Refusal]


class UnitFinder(Method, abc.ABC):
    """Finds one kind of unit. Masked output equals cut output."""

    default: ClassVar[bool] = True
    """Whether units of this kind are looked for unless others are named."""
    actions: ClassVar[tuple[Action, ...]] = ("drop",)
    """What can be done to a unit of this kind."""

    def find(self, model: nn.Module, batch: Tensor) -> UnitSearch:
        """The units of this kind in a model, in the order of the network.

        Args:
            model: left untouched.
            batch: a few samples, on the model's device.

        Raises:
            ModelError: the model cannot be run on the batch or answers with NaN.
        """
        return self.search(Observation(model, batch))

    @abc.abstractmethod
    def search(self, observation: Observation) -> UnitSearch:
        """The same of a model that has been looked at already; what was seen is shared with other kinds."""

    @abc.abstractmethod
    def example(self, n: int = 4) -> tuple[nn.Module, Tensor]:
        """A small model in eval mode that holds at least two units of this kind, and ``n`` samples: for the checks."""


class DepthUnits(UnitFinder):
    """A kind of unit that goes as a whole."""

    def cut(self, model: nn.Module, units: Sequence[DepthUnit]) -> nn.Module:
        """A new model without the units; all other paths keep their names, and ``model`` stays as it is."""
        student = copied_without(model, units)
        for unit in units:
            self.drop(student, unit)
        return student

    def drop(self, student: nn.Module, unit: DepthUnit) -> None:
        """Take the unit out of ``student``, in place."""
        drop(student, unit)

    def replacement(self, unit: DepthUnit) -> nn.Module:
        """An untrained linear replacement of the unit (for timing, and to load weights into).

        Raises:
            UnsupportedError: units of this kind have none.
        """
        raise UnsupportedError(f"{unit.id} has no linear replacement: units of kind {self.name} can only be dropped")


class WidthUnits(UnitFinder):
    """A kind of unit whose members, heads, neurons or channels, go one by one."""

    actions: ClassVar[tuple[Action, ...]] = ("narrow",)

    @abc.abstractmethod
    def narrow(self, student: nn.Module, unit: WidthUnit, kept_members: Sequence[int]) -> None:
        """Take all members but the kept ones out of ``student``, in place; they are numbered as found."""
