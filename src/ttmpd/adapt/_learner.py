"""What the adapters share that make several passes over a fixed set; a guard, without labels, goes back on collapse."""

import abc
import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.adaptation import (
    Adaptation,
    Anchor,
    Loss,
    Selection,
    anchor,
    check_optimizer,
    n_classes,
    pieces,
    redundancy_for,
)
from ttmpd.guard import logits_of
from ttmpd.losses import entropy_of, mutual_information
from ttmpd.method import check_range
from ttmpd.modules import call, clone, evaluating, has_nan
from ttmpd.norms import norm_parameters, using_batch_statistics
from ttmpd.progress import track
from ttmpd.records import Samples
from ttmpd.training import batch_order

MIN_SPREAD = 0.9
"""Answers have collapsed when the entropy of their mean falls below this share of what it was at the start."""
MIN_INFORMATION = 0.95
"""The same for mutual information; a method that makes unsure answers less sure may lose a little of it."""


class Learner(Adapter):
    """Scale and shift of the normalisation layers learn from the samples; statistics are mixed as in `norm`."""

    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    lr: float = 5e-4
    """Learning rate; twice as much, as Tent's paper for a single pass, costs accuracy after several."""
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
        check_range(f"{self.name}.lr", self.lr, 0.0)
        check_optimizer(f"{self.name}.optimizer", self.optimizer)
        check_range(f"{self.name}.epochs", self.epochs, 1)
        check_range(f"{self.name}.batch", self.batch, 2)
        check_range(f"{self.name}.max_samples", self.max_samples, 2)

    @abc.abstractmethod
    def begin(self, model: nn.Module, samples: Samples, seed: int) -> Adaptation:
        """What a step does; ``model`` is a copy that steps may change."""

    def hindrance(self, teacher: nn.Module, samples: Samples) -> str:
        """Why nothing can be learned; "" when something can."""
        if not norm_parameters(teacher):
            return "nothing to do: the model has no normalisation layer with scale and shift"
        if len(samples) < 2:
            return "nothing done: whether answers stay varied cannot be seen in one sample"
        return ""

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """A copy of the teacher that learned from the samples; the teacher itself where nothing can be done.

        Facts: ``selected_share`` of the samples that steps saw, forward and backward passes per sample (those for
        mixing left out), ``epochs`` that were kept, ``rolled_back`` 0 or 1, and the facts of mixing.

        Cost: two forward passes and a backward pass per sample and epoch, beside those of `norm`, twice with batch
        statistics. With a selection, one more forward pass and the backward pass for selected samples alone.
        """
        hindrance = self.hindrance(teacher, samples)
        if hindrance:
            return Adapted(teacher, hindrance)
        mix = partial(Norm().adapt, batch_size=batch_size, seed=seed)
        few = samples.first(self.max_samples)
        mixed = mix(teacher, few)
        adaptation = self.begin(clone(teacher if self.batch_statistics else mixed.model), few, seed)
        kept, reason = self._learn(adaptation, few, batch_size, seed)
        if self.batch_statistics:
            mixed, kept, reason = _mixed_again(mixed, mix(adaptation.model, few), few, batch_size, kept, reason)
        model = mixed.model if self.batch_statistics else adaptation.model
        facts = mixed.facts | _counts(adaptation, few) | {"epochs": float(kept), "rolled_back": float(bool(reason))}
        return Adapted(model, _note(mixed, kept, reason), facts)

    def adaptation(self, model: nn.Module, loss: Loss, selection: Selection | None = None) -> Adaptation:
        """An adaptation by this method's hyper-parameters."""
        return Adaptation(
            model,
            loss,
            lr=self.lr,
            optimizer=self.optimizer,
            selection=selection,
            batch_statistics=self.batch_statistics,
        )

    def _learn(self, adaptation: Adaptation, samples: Samples, batch_size: int, seed: int) -> tuple[int, str]:
        """At the first sign of collapse back to the last good epoch; the number of epochs kept, and why no more."""
        n, device = len(samples), adaptation.parameters[0].device
        start, good = _answers(adaptation, samples, batch_size), adaptation.state()
        per_epoch = max(1, n // self.batch)
        for epoch in track(range(self.epochs), "adapt", self.epochs):
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                adaptation.step(samples.batch(batch_order(n, self.batch, step, seed), device))
            reason = collapse(start, _answers(adaptation, samples, batch_size))
            if reason:
                adaptation.load(good)
                return epoch, f"rolled back after epoch {epoch + 1}: {reason}"
            good = adaptation.state()
        return self.epochs, ""


class SelectiveLearner(Learner):
    """Learns from sure and varied samples alone, and stays near where it started where that matters."""

    e0: float = 0.4
    """Samples whose entropy is below e0 x ln(n_classes) are sure enough."""
    redundancy: float = 0.0
    """Samples whose cosine to the mean answer so far is smaller are varied enough; 0: by the number of classes."""
    beta: float = 1.0
    """Weight of the distance from the start; 0 leaves it and its Fisher information out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("e0", "redundancy", "beta"):
            check_range(f"{self.name}.{name}", getattr(self, name), 0.0)

    def selective(self, model: nn.Module, samples: Samples, loss: Callable[[float], Loss]) -> Adaptation:
        """An adaptation whose loss is the method's, made for a margin of entropy, and the distance from the start.

        Cost: a forward and a backward pass per sample for the Fisher information.
        """
        classes = n_classes(model, samples)
        margin = self.e0 * math.log(classes)
        held = anchor(model, samples, self.batch, self.batch_statistics) if self.beta else None
        selection = Selection(margin, self.redundancy or redundancy_for(classes))
        adaptation = self.adaptation(model, self._anchored(loss(margin), held), selection)
        adaptation.charge(len(samples) if held else 0)
        return adaptation

    def _anchored(self, loss: Loss, held: Anchor | None) -> Loss:
        if held is None:
            return loss
        return lambda before, again, step: loss(before, again, step) + self.beta * held.penalty()


def collapse(start: Tensor, now: Tensor) -> str:
    """Why the answers have got worse as a whole, judged without labels; "" when they have not.

    Args:
        start: (N, n_classes) logits before adaptation.
        now: the same after it.
    """
    if has_nan(now):
        return "answers were not finite"
    spread, spread_start = (float(entropy_of(logits.softmax(-1).mean(0))) for logits in (now, start))
    if spread < MIN_SPREAD * spread_start:
        return "answers gathered in few classes"
    if mutual_information(now) < MIN_INFORMATION * mutual_information(start):
        return "answers told less of the samples"
    return ""


def _answers(adaptation: Adaptation, samples: Samples, batch_size: int) -> Tensor:
    """(N, n_classes) logits in the configuration in which steps are made, on the CPU."""
    adaptation.n_forward += len(samples)
    model = adaptation.model
    if not adaptation.batch_statistics:
        return logits_of(model, samples, batch_size)
    device = adaptation.parameters[0].device
    with evaluating(model), using_batch_statistics(model):
        answers = [call(model, samples.batch(index, device)) for index in pieces(len(samples), batch_size)]
    return torch.cat(answers).float().cpu()


def _mixed_again(
    before: Adapted, after: Adapted, samples: Samples, batch_size: int, kept: int, reason: str
) -> tuple[Adapted, int, str]:
    """What was learned with batch statistics must hold with mixed ones too."""
    answers = [logits_of(mixed.model, samples, batch_size) for mixed in (before, after)]
    worse = collapse(answers[0], answers[1])
    return (before, 0, f"rolled back, for with mixed statistics {worse}") if worse else (after, kept, reason)


def _counts(adaptation: Adaptation, samples: Samples) -> dict[str, float]:
    return {
        "selected_share": adaptation.n_selected / max(1, adaptation.n_seen),
        "forward_per_sample": adaptation.n_forward / len(samples),
        "backward_per_sample": adaptation.n_backward / len(samples),
    }


def _note(mixed: Adapted, kept: int, reason: str) -> str:
    parts = [mixed.note] if mixed.facts else []
    parts += [f"scale and shift trained without labels, epochs: {kept}" if kept else "scale and shift left alone"]
    return "; ".join([*parts, reason] if reason else parts)
