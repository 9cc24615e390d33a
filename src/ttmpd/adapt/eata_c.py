"""Adaptation by agreement with parts of oneself: surer where the parts agree, less sure where they do not."""

import math
import random
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.adaptation import Adaptation, Again, Anchor, Selection, anchor, n_classes, redundancy_for
from ttmpd.losses import entropy, fused, signed_entropy
from ttmpd.method import check_range
from ttmpd.passes import adapt_in_passes, check_recipe
from ttmpd.records import Samples, Unit
from ttmpd.units.block import Block


class EATAC(Adapter):
    """A part of the network, blocks skipped at random, learns what it and the whole answer together."""

    source: ClassVar[str] = (
        "EATA-C (Tan et al., TPAMI 2025); formulas of a re-implementation that cites equations 11 and 14; selection "
        "and distance from the start as in `eata`; parts are made of the blocks that can be removed"
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
    skip: float = 0.2
    """Each removable block is skipped with this probability, drawn anew for every step."""
    share: float = 0.5
    """p of the joint answer (whole + (1 - p) part) / (2 - p): of 0 both count alike, of 1 the whole alone."""
    alpha: float = 0.1
    """Weight of the entropy, made smaller where whole and part agree and larger where they do not."""
    beta: float = 1.0
    """Weight of the distance from the start; 0 leaves it and its Fisher information out."""
    weighted: bool = False
    """Surer samples count more, by exp(margin - entropy). The paper leaves it open."""
    detach_fused: bool = True
    """The joint answer is a fixed target: no gradients through the part's share in it. The paper leaves it open."""

    def __post_init__(self) -> None:
        check_recipe("eata_c", self)
        for name in ("e0", "redundancy", "alpha", "beta"):
            check_range(f"eata_c.{name}", getattr(self, name), 0.0)
        for name in ("skip", "share"):
            check_range(f"eata_c.{name}", getattr(self, name), 0.0, 1.0)

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """An adapted copy of the teacher; the teacher itself when it has no scale and shift to train or no blocks.

        Cost: as `eata`.
        """
        units = Block().find(teacher, samples.batch(slice(0, 2), _device(teacher))).units if len(samples) > 1 else ()
        if len(samples) > 1 and not units:
            return Adapted(teacher, "nothing done: the model has no blocks that can be skipped")
        mix = partial(Norm().adapt, batch_size=batch_size, seed=seed)
        begin = partial(self._begin, units, seed)
        return Adapted(*adapt_in_passes(self, teacher, samples, mix, begin, batch_size=batch_size, seed=seed))

    def _begin(self, units: Sequence[Unit], seed: int, model: nn.Module, samples: Samples) -> Adaptation:
        classes = n_classes(model, samples)
        margin = self.e0 * math.log(classes)
        held = anchor(model, samples, self.batch, self.batch_statistics) if self.beta else None

        def loss(before: Tensor, again: Again, step: int) -> Tensor:
            with Block().mask(model, drawn(units, self.skip, seed, step)):
                return self._loss(before, again(), margin, held)

        adaptation = Adaptation(
            model,
            loss,
            lr=self.lr,
            optimizer=self.optimizer,
            selection=Selection(margin, self.redundancy or redundancy_for(classes)),
            batch_statistics=self.batch_statistics,
        )
        adaptation.charge(len(samples) if held else 0)
        return adaptation

    def _loss(self, whole: Tensor, part: Tensor, margin: float, held: Anchor | None) -> Tensor:
        """The mean of KL(joint || part) + alpha C H(part), and beta sum F (theta - theta_0)^2."""
        joint = fused(whole.float().softmax(-1), part.float().softmax(-1), self.share)
        if self.detach_fused:
            joint = joint.detach()
        apart = F.kl_div(part.float().log_softmax(-1), joint, reduction="none").sum(-1)
        weight = (margin - entropy(whole)).exp() if self.weighted else 1.0
        loss = (weight * (apart + self.alpha * signed_entropy(whole, part))).mean()
        return loss + self.beta * held.penalty() if held else loss


def drawn(units: Sequence[Unit], skip: float, seed: int, step: int) -> tuple[Unit, ...]:
    """The units that are skipped in a step: a function of the arguments alone, so that a reset begins again."""
    draw = random.Random(seed * 100_003 + step)
    return tuple(unit for unit in units if draw.random() < skip)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
