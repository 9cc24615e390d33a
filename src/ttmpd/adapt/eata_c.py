"""Adaptation by agreement with parts of oneself: surer where the parts agree, less sure where they do not."""

import random
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.adapt._learner import SelectiveLearner
from ttmpd.adaptation import Adaptation, Again
from ttmpd.losses import entropy, fused, signed_entropy
from ttmpd.method import check_fields
from ttmpd.records import Samples, Unit
from ttmpd.units.block import Block


class EATAC(SelectiveLearner):
    """A part of the network, blocks skipped at random, learns what it and the whole answer together."""

    source: ClassVar[str] = (
        "EATA-C (Tan et al., TPAMI 2025); formulas of a re-implementation that cites equations 11 and 14; selection "
        "and distance from the start as in `eata`; parts are made of the blocks that can be removed"
    )
    skip: float = 0.2
    """Each removable block is skipped with this probability, drawn anew for every step."""
    share: float = 0.5
    """p of the joint answer (whole + (1 - p) part) / (2 - p): of 0 both count alike, of 1 the whole alone."""
    alpha: float = 0.1
    """Weight of the entropy, made smaller where whole and part agree and larger where they do not."""
    weighted: bool = False
    """Surer samples count more, by exp(margin - entropy). Whether the paper does so is not known here."""
    detach_fused: bool = True
    """The joint answer is a fixed target: no gradients through the part's share in it. As unknown as the above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, alpha=0.0, skip=(0.0, 1.0), share=(0.0, 1.0))

    def hindrance(self, teacher: nn.Module, samples: Samples) -> str:
        """A model without removable blocks has no parts."""
        found = super().hindrance(teacher, samples)
        if not found and not _units(teacher, samples):
            return "nothing done: the model has no blocks that can be skipped"
        return found

    def begin(self, model: nn.Module, samples: Samples, seed: int) -> Adaptation:
        """The loss is the mean of KL(joint || part) + alpha C H(part), and beta sum F (theta - theta_0)^2."""
        units = _units(model, samples)

        def loss(margin: float, before: Tensor, again: Again, step: int) -> Tensor:
            with Block().mask(model, drawn(units, self.skip, seed, step)):
                return self._loss(before, again(), margin)

        return self.selective(model, samples, lambda margin: partial(loss, margin), anew=True)

    def _loss(self, whole: Tensor, part: Tensor, margin: float) -> Tensor:
        joint = fused(whole.float().softmax(-1), part.float().softmax(-1), self.share)
        if self.detach_fused:
            joint = joint.detach()
        apart = F.kl_div(part.float().log_softmax(-1), joint, reduction="none").sum(-1)
        weight = (margin - entropy(whole)).exp() if self.weighted else 1.0
        return (weight * (apart + self.alpha * signed_entropy(whole, part))).mean()


def drawn(units: Sequence[Unit], skip: float, seed: int, step: int) -> tuple[Unit, ...]:
    """The units that are skipped in a step: a function of the arguments alone, so that a reset begins again."""
    draw = random.Random(seed * 100_003 + step)
    return tuple(unit for unit in units if draw.random() < skip)


def _units(model: nn.Module, samples: Samples) -> tuple[Unit, ...]:
    return Block().find(model, samples.batch(slice(0, 2), next(model.parameters()).device)).units
