"""The contract of an adapter."""

import abc
from dataclasses import dataclass, field

from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.method import Method


@dataclass(frozen=True, eq=False)
class Adapted:
    """A teacher after adaptation.

    Args:
        model: a new model; the one passed in stays as it was.
        note: one line for the user: what was done, or why nothing was.
        facts: numbers for the report.
    """

    model: nn.Module
    note: str
    facts: dict[str, float] = field(default_factory=dict)


class Adapter(Method, abc.ABC):
    """Adapts the teacher to the data, without labels, before it makes pseudo labels."""

    @abc.abstractmethod
    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """An adapted copy of the teacher."""
