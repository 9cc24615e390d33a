"""The contract of a kind of unit."""

import abc
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.method import Method
from ttmpd.records import Action, Unit


@dataclass(frozen=True, slots=True)
class Found:
    """What a model offers.

    Args:
        units: removable, in the order in which the network runs them.
        refused: (path, reason) of parts that look like units and are not removable.
    """

    units: tuple[Unit, ...]
    refused: tuple[tuple[str, str], ...]


class Kind(Method, abc.ABC):
    """Finds one kind of unit, and removes it. Masked output equals cut output."""

    actions: ClassVar[tuple[Action, ...]] = ("drop",)

    @abc.abstractmethod
    def find(self, model: nn.Module, batch: Tensor) -> Found:
        """The units of ``model``, seen by running ``batch`` (a few samples, already on the model's device)."""


class Whole(Kind):
    """A kind of unit that goes as a whole, and may have a stand-in."""

    @abc.abstractmethod
    def cut(self, model: nn.Module, units: Sequence[Unit]) -> nn.Module:
        """A new model without the units; ``model`` stays as it is."""

    @abc.abstractmethod
    def mask(self, model: nn.Module, units: Sequence[Unit]) -> contextlib.AbstractContextManager[None]:
        """While active, ``model`` answers as the cut model would, with nothing removed."""

    @abc.abstractmethod
    def stand_in(self, unit: Unit) -> nn.Module:
        """An untrained linear replacement of the right shape for the unit (for timing, and to load weights into).

        Raises:
            UnsupportedError: this kind has no linear stand-in.
        """


class Narrow(Kind):
    """A kind of unit whose members, heads, neurons or channels, go one by one.

    The layer at ``unit.path`` reads ``width`` inputs of every member; the members are made by the layers
    ``unit.feeders``.
    """

    actions: ClassVar[tuple[Action, ...]] = ("narrow",)

    @abc.abstractmethod
    def narrow(self, student: nn.Module, unit: Unit, kept: Sequence[int]) -> None:
        """Take all members but ``kept`` out of ``student``, in place; they are numbered as found."""
