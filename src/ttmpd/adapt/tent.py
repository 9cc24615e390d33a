"""Entropy minimisation at test time: the simplest way to learn from one's own answers."""

from functools import partial
from typing import ClassVar

from torch import nn

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.adaptation import Adaptation
from ttmpd.losses import entropy
from ttmpd.passes import adapt_in_passes, check_recipe
from ttmpd.records import Samples


class Tent(Adapter):
    """Scale and shift of the normalisation layers make the mean entropy of the answers smaller."""

    source: ClassVar[str] = (
        "Tent (Wang et al., ICLR 2021, arXiv 2006.10726); here on a fixed set in several passes, with a guard against "
        "collapse; afterwards `norm` mixes statistics that hold for any batch"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    lr: float = 5e-4
    """Learning rate; twice as much, as in the paper for a single pass, costs accuracy after several."""
    optimizer: str = "adam"
    """"adam", or "sgd" with momentum 0.9."""
    epochs: int = 5
    """Passes over the samples."""
    batch: int = 64
    """Samples per step."""
    batch_statistics: bool = True
    """Steps use the statistics of the batch, as in the paper, and `norm` mixes them after the last step.

    Otherwise it mixes them before the first step: this learns faster, and goes wrong sooner where the shift is mild.
    """
    max_samples: int = 512
    """Only the first so many samples are used."""

    def __post_init__(self) -> None:
        check_recipe("tent", self)

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """A copy of the teacher, surer of its answers; the teacher itself when it has no scale and shift to train.

        Cost: two forward passes and a backward pass per sample and epoch, beside those of `norm`, twice with batch
        statistics.
        """
        mix = partial(Norm().adapt, batch_size=batch_size, seed=seed)
        return Adapted(*adapt_in_passes(self, teacher, samples, mix, self._begin, batch_size=batch_size, seed=seed))

    def _begin(self, model: nn.Module, _: Samples) -> Adaptation:
        return Adaptation(
            model,
            lambda _before, again, _step: entropy(again()).mean(),
            lr=self.lr,
            optimizer=self.optimizer,
            batch_statistics=self.batch_statistics,
        )
