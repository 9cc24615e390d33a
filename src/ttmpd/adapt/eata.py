"""Entropy minimisation on the samples that are worth it, without forgetting."""

import math
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.adaptation import Adaptation, Again, Anchor, Selection, anchor, n_classes, redundancy_for
from ttmpd.losses import entropy
from ttmpd.method import check_range
from ttmpd.passes import adapt_in_passes, check_recipe
from ttmpd.records import Samples


class EATA(Adapter):
    """Tent on sure and varied samples only, held near where it started where that matters."""

    source: ClassVar[str] = (
        "EATA (Niu et al., ICML 2022, arXiv 2204.02610), Fisher information as in the authors' code but divided by its "
        "mean; selected samples are gathered and run again; passes, statistics and guard as in `tent`"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    lr: float = 5e-4
    """Learning rate."""
    optimizer: str = "adam"
    """"adam", or "sgd" with momentum 0.9."""
    epochs: int = 5
    """Passes over the samples."""
    batch: int = 64
    """Samples per step, and per gradient of the Fisher information."""
    batch_statistics: bool = True
    """Steps use the statistics of the batch, as in the paper, and `norm` mixes them after the last step: see `tent`."""
    max_samples: int = 512
    """Only the first so many samples are used."""
    e0: float = 0.4
    """Samples whose entropy is below e0 x ln(n_classes) are sure enough."""
    redundancy: float = 0.0
    """Samples whose cosine to the mean answer so far is smaller are varied enough; 0: by the number of classes."""
    weighted: bool = True
    """Surer samples count more, by exp(margin - entropy)."""
    beta: float = 1.0
    """Weight of the distance from the start; 0 leaves it and its Fisher information out (ETA)."""

    def __post_init__(self) -> None:
        check_recipe("eata", self)
        check_range("eata.e0", self.e0, 0.0)
        check_range("eata.redundancy", self.redundancy, 0.0)
        check_range("eata.beta", self.beta, 0.0)

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """A copy of the teacher, surer of its answers; the teacher itself when it has no scale and shift to train.

        Cost: per epoch two forward passes per sample, one more and a backward pass per selected sample; a forward and a
        backward pass per sample for the Fisher information; those of `norm`, twice with batch statistics.
        """
        mix = partial(Norm().adapt, batch_size=batch_size, seed=seed)
        return Adapted(*adapt_in_passes(self, teacher, samples, mix, self._begin, batch_size=batch_size, seed=seed))

    def _begin(self, model: nn.Module, samples: Samples) -> Adaptation:
        classes = n_classes(model, samples)
        margin = self.e0 * math.log(classes)
        held = anchor(model, samples, self.batch, self.batch_statistics) if self.beta else None
        adaptation = Adaptation(
            model,
            partial(self._loss, margin, held),
            lr=self.lr,
            optimizer=self.optimizer,
            selection=Selection(margin, self.redundancy or redundancy_for(classes)),
            batch_statistics=self.batch_statistics,
        )
        adaptation.charge(len(samples) if held else 0)
        return adaptation

    def _loss(self, margin: float, held: Anchor | None, _before: Tensor, again: Again, _step: int) -> Tensor:
        """The mean of exp(margin - H) H, and beta sum F (theta - theta_0)^2."""
        unsure = entropy(again())
        weight = (margin - unsure.detach()).exp() if self.weighted else 1.0
        loss = (weight * unsure).mean()
        return loss + self.beta * held.penalty() if held else loss
