"""Leave the teacher as it is."""

from typing import ClassVar

from torch import nn

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.data.samples import Samples


class NoAdaptation(Adapter):
    """The null object: hands the teacher on."""

    source: ClassVar[str] = "control"

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """The teacher itself."""
        return Adapted(teacher, "switched off")
