"""Shared by the adapters that train on a fixed set in several passes, with a label-free guard against collapse."""

import abc
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.data.samples import Samples
from ttmpd.errors import UnsupportedError
from ttmpd.method import check_fields
from ttmpd.models.modules import clone, has_nan
from ttmpd.models.norms import norm_parameters, using_batch_statistics
from ttmpd.models.run import evaluating, predict, predictions_of
from ttmpd.models.tokens import predicted_token_mask
from ttmpd.progress import track
from ttmpd.quality.evidence import parting
from ttmpd.tasks.base import OneOf, Task
from ttmpd.tasks.classification import Classification
from ttmpd.training.task import task_of
from ttmpd.training.test_time import (
    Adaptation,
    FisherPenalty,
    Loss,
    ReliableSampleFilter,
    check_optimizer,
    fisher_penalty,
    n_classes,
    pieces,
    redundancy_for,
)

MIN_SPREAD = 0.9
"""Predictions have collapsed when the entropy of their mean falls below this share of its value at the start."""
MIN_INFORMATION = 0.95
"""Smallest share of the initial mutual information that predictions must keep.

Below 1, since a method that lowers the confidence of unsure predictions loses a little of it.
"""


_NOTHING_LEARNED = {
    "selected_share": 0.0,
    "forward_per_sample": 0.0,
    "backward_per_sample": 0.0,
    "epochs": 0.0,
    "rolled_back": 0.0,
}


class Learner(Adapter):
    """Trains scale and shift of the normalisation layers on the samples and mixes their statistics as `norm` does."""

    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    lr: float = 5e-4
    """Learning rate: half of Tent's, which makes a single pass where this makes several."""
    optimizer: str = "adam"
    """"adam", or "sgd" with momentum 0.9."""
    epochs: int = 5
    """Passes over the samples."""
    batch_size: int = 64
    """Samples per step."""
    max_samples: int = 512
    """Samples that are used, from the first on."""

    def __post_init__(self) -> None:
        check_optimizer(f"{self.name}.optimizer", self.optimizer)
        check_fields(self, lr=0.0, epochs=1, batch_size=2, max_samples=2)

    @abc.abstractmethod
    def begin(self, model: nn.Module, samples: Samples, seed: int) -> Adaptation:
        """The adaptation of ``model``, a copy that its steps may change."""

    def reason_not_to_adapt(self, teacher: nn.Module, samples: Samples) -> str:
        """The reason why nothing can be learned, as a note for the user; "" where something can."""
        if not norm_parameters(teacher):
            return "nothing to do: the model has no normalisation layer with scale and shift"
        if len(samples) < 2:
            return "nothing done: whether answers stay varied cannot be seen in one sample"
        return ""

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """A copy of the teacher that learned from the samples; the teacher itself where nothing can or shall be done.

        Steps begin from, and use, the statistics that `norm` mixes. Where it finds no shift there is nothing to learn.

        Facts: ``selected_share`` of the samples that steps saw, forward and backward passes per sample (those for
        mixing left out), ``epochs`` that were kept, ``rolled_back`` 0 or 1, and the facts of mixing, ``explained``
        before anything was learned.

        Raises:
            UnsupportedError: the teacher answers each token of a text.

        Cost: a forward pass per sample, once and per epoch, and a forward and a backward pass per sample that steps
        see; beside those of `norm`.
        """
        self.check_task(teacher, samples)
        if reason := self.reason_not_to_adapt(teacher, samples):
            return Adapted(teacher, reason)
        subset = samples.first(self.max_samples)
        mixed, source = Norm().mixed(teacher, subset, batch_size)
        if source is not None and mixed.model is teacher:
            return Adapted(teacher, mixed.note, mixed.facts | _NOTHING_LEARNED)
        adaptation = self.begin(clone(mixed.model), subset, seed)
        start = _answers(adaptation, subset, batch_size)
        answers, n_epochs, reason = self._learn(adaptation, start, subset, batch_size, seed)
        told = parting(start if source is None else source, answers, task_of(teacher))
        facts = mixed.facts | _counts(adaptation, subset) | told.facts
        facts |= {"epochs": float(n_epochs), "rolled_back": float(bool(reason))}
        return Adapted(adaptation.model, f"{_note(mixed, n_epochs, reason)}{told.note}", facts)

    def check_task(self, teacher: nn.Module, samples: Samples) -> None:
        """Raise :class:`UnsupportedError` where the teacher's predictions cannot be learned from."""
        task = task_of(teacher)
        if task.reason_not_to_adapt:
            raise UnsupportedError(
                f"{self.name} must learn from how sure predictions are, but the task is {task.name}: "
                f"{task.reason_not_to_adapt}; use none"
            )
        if task.each == "pixel" or predicted_token_mask(teacher, samples.inputs[:1]) is not None:
            raise UnsupportedError(
                f"{self.name} must learn from one answer per sample, but {type(teacher).__name__} answers each "
                f"{'pixel' if task.each == 'pixel' else 'token'}; use norm, or none"
            )

    def adaptation(self, model: nn.Module, loss: Loss, **more: Any) -> Adaptation:
        """An adaptation by this method's hyper-parameters."""
        return Adaptation(model, loss, lr=self.lr, optimizer=self.optimizer, **more)

    def _learn(
        self, adaptation: Adaptation, start: Tensor, samples: Samples, batch_size: int, seed: int
    ) -> tuple[Tensor, int, str]:
        """Train epoch by epoch; at the first sign of collapse go back to the last good one.

        Returns:
            The answers in the end, the number of epochs that were kept, and why no more; "" where all were.
        """
        device = adaptation.parameters[0].device
        good, answers = (adaptation.state(), start), start
        for epoch in track(range(self.epochs), "adapt", self.epochs):
            for index in self._batches(adaptation, answers, seed * 100_003 + epoch):
                adaptation.learn(samples.trimmed(index, device))
            answers = _answers(adaptation, samples, batch_size)
            reason = collapse(start, answers, task_of(adaptation.model))
            if reason:
                adaptation.load(good[0])
                return good[1], epoch, f"rolled back after epoch {epoch + 1}: {reason}"
            good = adaptation.state(), answers
        return answers, self.epochs, ""

    def _batches(self, adaptation: Adaptation, answers: Tensor, seed: int) -> Iterator[Tensor]:
        """Positions of the samples of every step of an epoch, selected by the predictions with which it begins.

        The guard has just made these predictions, so that selecting needs no further pass, and every step is made on
        a whole batch. A last batch that is not full is left out, unless it is the only one.
        """
        order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
        adaptation.n_seen += len(order)
        if adaptation.selection is not None:
            probabilities = answers.float().softmax(-1)
            parts = [
                part[adaptation.selection.choose(probabilities[part])] for part in torch.split(order, self.batch_size)
            ]
            order = torch.cat(parts)
        size = min(self.batch_size, len(order))
        return iter(torch.split(order[: len(order) // size * size], size) if size else ())


class SelectiveLearner(Learner):
    """Learns from confident and varied samples alone; a Fisher penalty holds important parameters near their start."""

    lr: float = 1e-3
    """Learning rate: higher than that of `tent`, since the penalty holds the model near its start."""
    epochs: int = 3
    """Passes over the samples: fewer than `tent` makes, since steps are longer."""
    e0: float = 0.4
    """Samples are selected whose entropy is below e0 x ln(n_classes)."""
    redundancy: float = 0.0
    """Samples are selected whose cosine to the mean prediction so far is smaller; 0: set by the number of classes."""
    beta: float = 1.0
    """Weight of the Fisher penalty on the distance from the start; 0 for none."""
    fisher_samples: int = 128
    """Samples from which the Fisher information is estimated."""

    def check_task(self, teacher: nn.Module, samples: Samples) -> None:
        """Raise :class:`UnsupportedError` also where there is not one row of class probabilities per sample."""
        super().check_task(teacher, samples)
        task = task_of(teacher)
        if not isinstance(task, OneOf) or len(task.widths) > 1:
            raise UnsupportedError(
                f"{self.name} must select by one row of class probabilities, but the task is {task.name}"
                f"{' of several parts' if len(task.widths) > 1 else ''}; use tent, norm or none"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, e0=0.0, redundancy=0.0, beta=0.0, fisher_samples=2)

    def selective(
        self, model: nn.Module, samples: Samples, loss: Callable[[float], Loss], separate_forward: bool = False
    ) -> Adaptation:
        """An adaptation that selects reliable samples; its loss is the method's plus the Fisher penalty.

        Cost: a forward and a backward pass for each sample of the Fisher information.
        """
        classes = n_classes(model, samples)
        margin = self.e0 * math.log(classes)
        subset = samples.first(self.fisher_samples)
        penalty = fisher_penalty(model, subset, self.batch_size) if self.beta else None
        selection = ReliableSampleFilter(margin, self.redundancy or redundancy_for(classes))
        penalized = self._penalized(loss(margin), penalty)
        adaptation = self.adaptation(model, penalized, selection=selection, separate_forward=separate_forward)
        adaptation.charge(len(subset) if penalty else 0)
        return adaptation

    def _penalized(self, loss: Loss, penalty: FisherPenalty | None) -> Loss:
        if penalty is None:
            return loss
        return lambda before, rerun, step: loss(before, rerun, step) + self.beta * penalty.value()


def collapse(start: Tensor, now: Tensor, task: Task | None = None) -> str:
    """The reason why predictions got worse as a whole, judged without labels; "" where they did not.

    Args:
        start: (N, n_classes) logits before adaptation.
        now: (N, n_classes) logits after it.
        task: what the model predicts; None for classes.
    """
    task = task or Classification()
    if has_nan(now):
        return "answers were not finite"
    # Entropy of the mean prediction = information + mean entropy of the single predictions.
    spread, spread_start = (float(task.information(rows) + task.uncertainty(rows).mean()) for rows in (now, start))
    if spread < MIN_SPREAD * spread_start:
        return "answers gathered in few classes"
    if task.information(now) < MIN_INFORMATION * task.information(start):
        return "answers told less of the samples"
    return ""


def _answers(adaptation: Adaptation, samples: Samples, batch_size: int) -> Tensor:
    """(N, n_classes) logits, on the CPU; the pass is counted."""
    adaptation.n_forward += len(samples)
    return predictions_of(adaptation.model, samples, batch_size)


def answers_by_batch(model: nn.Module, samples: Samples, batch_size: int) -> Tensor:
    """(N, n_classes) logits, on the CPU, of a model whose batch normalisation takes the statistics of each batch."""
    device = next(model.parameters()).device
    with evaluating(model), using_batch_statistics(model):
        answers = [predict(model, samples.trimmed(index, device)) for index in pieces(len(samples), batch_size)]
    return torch.cat(answers).float().cpu()


def _counts(adaptation: Adaptation, samples: Samples) -> dict[str, float]:
    return {
        "selected_share": adaptation.n_selected / max(1, adaptation.n_seen),
        "forward_per_sample": adaptation.n_forward / len(samples),
        "backward_per_sample": adaptation.n_backward / len(samples),
    }


def _note(mixed: Adapted, n_epochs: int, reason: str) -> str:
    statistics = mixed.note.partition(";")[0] if mixed.facts else ""
    learned = (
        f"scale and shift trained without labels, epochs: {n_epochs}" if n_epochs else "scale and shift left alone"
    )
    return "; ".join(part for part in (statistics, learned, reason) if part)
