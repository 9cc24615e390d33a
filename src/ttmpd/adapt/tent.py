"""Entropy minimisation at test time: the simplest way to learn from a model's own predictions."""

from typing import ClassVar

from torch import nn

from ttmpd.adapt._learner import Learner
from ttmpd.data.samples import Samples
from ttmpd.training.task import task_of
from ttmpd.training.test_time import Adaptation


class Tent(Learner):
    """Scale and shift of the normalisation layers are trained to lower the mean entropy of the predictions."""

    source: ClassVar[str] = (
        "Tent (Wang et al., ICLR 2021, arXiv 2006.10726); here on a fixed set in several passes, with a guard against "
        "collapse, and with the statistics that `norm` mixes, which hold for any batch, in the place of the batch's own"
    )

    def begin(self, model: nn.Module, samples: Samples, seed: int) -> Adaptation:
        """The loss is the mean entropy."""
        return self.adaptation(model, lambda _before, rerun, _step: task_of(model).uncertainty(rerun()).mean())
