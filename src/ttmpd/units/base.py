"""The contract of a kind of unit."""

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.method import Method
from ttmpd.records import KERNELS, Action, Unit


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
    """Finds, masks and cuts one kind of unit. Masked output equals cut output."""

    actions: ClassVar[tuple[str, ...]] = ("drop",)

    @abc.abstractmethod
    def find(self, model: nn.Module, batch: Tensor) -> Found:
        """The units of ``model``, seen by running ``batch`` (a few samples, already on the model's device)."""

    @abc.abstractmethod
    def cut(self, model: nn.Module, units: Sequence[Unit]) -> nn.Module:
        """A new model without the units; ``model`` stays as it is."""

    @abc.abstractmethod
    def mask(self, model: nn.Module, units: Sequence[Unit]) -> contextlib.AbstractContextManager[None]:
        """While active, ``model`` answers as the cut model would, with nothing removed."""

    def stand_ins(self, unit: Unit) -> tuple[Action, ...]:
        """The stand-ins that can take the unit's place."""
        return tuple(action for action in KERNELS if action in self.actions)

    @abc.abstractmethod
    def stand_in(self, unit: Unit, action: Action = "linear") -> nn.Module:
        """An untrained linear replacement of the right shape for the unit (for timing, and to load weights into).

        Raises:
            UnsupportedError: this kind has no linear stand-in.
        """


@contextlib.contextmanager
def no_mask() -> Iterator[None]:
    """The mask of an empty choice."""
    yield


Weights = Mapping[str, Tensor]
