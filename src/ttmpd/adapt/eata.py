"""Entropy minimisation on the samples that are worth it, without forgetting."""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.adapt._learner import SelectiveLearner
from ttmpd.data.samples import Samples
from ttmpd.training.losses import entropy
from ttmpd.training.test_time import Adaptation, Rerun


class EATA(SelectiveLearner):
    """Tent on confident and varied samples only; a Fisher penalty holds important parameters near their start."""

    source: ClassVar[str] = (
        "EATA (Niu et al., ICML 2022, arXiv 2204.02610), Fisher information as in the authors' code but divided by its "
        "mean; on a fixed set samples are selected once per pass; passes, statistics and guard as in `tent`"
    )
    weighted: bool = True
    """Weigh samples by exp(margin - entropy): confident ones count more."""

    def begin(self, model: nn.Module, samples: Samples, seed: int) -> Adaptation:
        """The loss is the mean of exp(margin - H) H, and beta sum F (theta - theta_0)^2; without beta, ETA."""
        return self.selective(model, samples, lambda margin: partial(self._loss, margin))

    def _loss(self, margin: float, _before: Tensor, rerun: Rerun, _step: int) -> Tensor:
        entropies = entropy(rerun())
        weight = (margin - entropies.detach()).exp() if self.weighted else 1.0
        return (weight * entropies).mean()
