"""Adaptation by agreement with sub-networks: more confident where they agree, less where they do not."""

import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.adapt._learner import SelectiveLearner, answers_by_batch
from ttmpd.adapt.base import Adapted
from ttmpd.data.samples import Samples
from ttmpd.method import check_fields
from ttmpd.models.modules import clone, module_at
from ttmpd.models.run import OTHER_KERNELS, evaluating, predict, predictions_of, same_outputs
from ttmpd.models.taps import find_output_layer
from ttmpd.quality.calibration import fit_temperature
from ttmpd.records import Unit
from ttmpd.surgery.find import find_units, holders_of, kinds_of
from ttmpd.surgery.masks import skipped
from ttmpd.training.losses import entropy, fused, signed_entropy
from ttmpd.training.test_time import Adaptation, Rerun

HOTTEST = 4.0
"""Highest temperature: where no block can be spared, sub-networks hardly ever agree with the whole."""


class EATAC(SelectiveLearner):
    """A sub-network, blocks skipped at random, learns the joint prediction of itself and the whole network."""

    source: ClassVar[str] = (
        "EATA-C (Tan et al., TPAMI 2025); formulas of a re-implementation that cites equations 11 and 14; selection "
        "and distance from the start as in `eata`; parts are made of the blocks that can be removed; a temperature by "
        "how often parts agree with the whole is this project's own"
    )
    skip: float = 0.2
    """Each removable block is skipped with this probability, drawn anew for every step."""
    share: float = 0.5
    """p of the joint prediction (whole + (1 - p) part) / (2 - p): with 0 both count alike, with 1 only the whole."""
    alpha: float = 0.1
    """Weight of the entropy term, which is lowered where whole and part agree and raised where they do not."""
    weighted: bool = False
    """Weigh samples by exp(margin - entropy): confident ones count more. The sources do not say what the paper does."""
    detach_fused: bool = True
    """Take the joint prediction as a fixed target, without gradients. The sources do not say what the paper does."""
    parts: int = 8
    """Number of sub-networks, each without one block, that the temperature is fitted to; 0 for no temperature.

    Steps on a few hundred samples hardly change the confidence of a network. So its logits are divided, once and in the
    output layer, by the temperature under which its confidence equals the share of sub-networks that agree with it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, alpha=0.0, skip=(0.0, 1.0), share=(0.0, 1.0), parts=0)

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """A copy of the teacher that learned from the samples, with its confidence scaled to how often its parts agree.

        Facts: those of `eata`, and ``temperature``, by which the logits were divided.

        Cost: that of `eata`, a further forward pass per step, one for each of the `parts`, and one for the whole.
        """
        adapted = super().adapt(teacher, samples, batch_size=batch_size, seed=seed)
        if not self.parts or adapted.model is teacher:
            return adapted
        subset, units = samples.first(self.max_samples), _units(adapted.model, samples)
        left_out = random.Random(seed).sample(units, min(self.parts, len(units)))
        model, note = adapted.model, adapted.note
        temperature = _temperature(model, subset, left_out, batch_size)
        if temperature > 1.0 and (divided := _divided(clone(model), subset, temperature)) is not None:
            model, note = divided, f"{note}; logits divided by {temperature:.2f}"
        else:
            temperature = 1.0
        n_forward = adapted.facts["forward_per_sample"] + 1 + len(left_out)
        return Adapted(model, note, adapted.facts | {"temperature": temperature, "forward_per_sample": n_forward})

    def reason_not_to_adapt(self, teacher: nn.Module, samples: Samples) -> str:
        """The reason why nothing can be learned: a model without removable blocks has no sub-networks, for one."""
        reason = super().reason_not_to_adapt(teacher, samples)
        if not reason and not _units(teacher, samples):
            return "nothing done: the model has no blocks that can be skipped"
        return reason

    def begin(self, model: nn.Module, samples: Samples, seed: int) -> Adaptation:
        """The loss is the mean of KL(joint || part) + alpha C H(part), and beta sum F (theta - theta_0)^2."""
        units = _units(model, samples)

        def loss(margin: float, before: Tensor, rerun: Rerun, step: int) -> Tensor:
            with skipped(model, drawn(units, self.skip, seed, step)):
                return self._loss(before, rerun(), margin)

        return self.selective(model, samples, lambda margin: partial(loss, margin), separate_forward=True)

    def _loss(self, whole: Tensor, part: Tensor, margin: float) -> Tensor:
        joint = fused(whole.float().softmax(-1), part.float().softmax(-1), self.share)
        if self.detach_fused:
            joint = joint.detach()
        apart = F.kl_div(part.float().log_softmax(-1), joint, reduction="none").sum(-1)
        weight = (margin - entropy(whole)).exp() if self.weighted else 1.0
        return (weight * (apart + self.alpha * signed_entropy(whole, part))).mean()


def drawn(units: Sequence[Unit], skip: float, seed: int, step: int) -> tuple[Unit, ...]:
    """The units that are skipped in a step: a function of the arguments alone, so that a reset run repeats them."""
    draw = random.Random(seed * 100_003 + step)
    return tuple(unit for unit in units if draw.random() < skip)


def _units(model: nn.Module, samples: Samples) -> tuple[Unit, ...]:
    batch = samples.batch(slice(0, 2), next(model.parameters()).device)
    units = find_units(model, batch, kinds_of("depth")).units
    holders = holders_of(units)
    return tuple(unit for unit in units if not holders[unit.id])


def _temperature(model: nn.Module, samples: Samples, left_out: Sequence[Unit], batch_size: int) -> float:
    """Temperature that scales the confidence of the whole network to its agreement with a part; the median over parts.

    A part lacks one of the units. It uses the statistics of the batch: the stored ones fit the whole network alone.
    """
    whole, temperatures = predictions_of(model, samples, batch_size), []
    for unit in left_out:
        with skipped(model, (unit,)):
            part = answers_by_batch(model, samples, batch_size)
        temperatures.append(fit_temperature(whole, part.argmax(-1)))
    return min(HOTTEST, max(1.0, statistics.median(temperatures)))


def _divided(model: nn.Module, samples: Samples, temperature: float) -> nn.Module | None:
    """The model, changed in place, with its logits divided; None where no layer that can be divided gives them."""
    batch = samples.batch(slice(0, 2), next(model.parameters()).device)
    path = find_output_layer(model, batch)
    if path is None:
        return None
    with evaluating(model), torch.no_grad():
        before = predict(model, batch)
        for parameter in module_at(model, path).parameters():
            parameter.div_(temperature)
        # A weight that is shared, or a norm of weights, would make it something else.
        same = same_outputs(predict(model, batch) * temperature, before, OTHER_KERNELS)
    return model if same else None
