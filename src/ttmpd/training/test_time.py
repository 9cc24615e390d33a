"""Test-time adaptation: scale and shift of the normalisation layers learn from predictions alone.

Tent, EATA and EATA-C share it.

:class:`Adaptation` makes one step per batch: for a stream, or for a fixed set that the adapters pass
several times.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.models.norms import learning, norm_parameters
from ttmpd.models.run import predict, predictions_of
from ttmpd.training.losses import entropy_of

OPTIMIZERS = ("adam", "sgd")
Rerun = Callable[[], Tensor]
Loss = Callable[[Tensor, Rerun, int], Tensor]
"""``loss(before, rerun, step)``: the selected samples' logits before the step, (n, n_classes), without gradients; a
function that runs these samples with gradients; the number of the step, to draw by."""


def pieces(n_samples: int, batch: int) -> tuple[Tensor, ...]:
    """Positions 0, 1, ... in pieces of about equal size, at least ``batch`` and at least two: no batch of one."""
    return torch.arange(n_samples).tensor_split(max(1, n_samples // max(2, batch)))


def n_classes(model: nn.Module, samples: Samples) -> int:
    """Number of classes that the model predicts, counted by running a sample."""
    return predictions_of(model, samples.first(1), 1).shape[-1]


def redundancy_for(n_classes: int) -> float:
    """Cosine to the mean prediction below which a prediction counts as different from it, by the number of classes.

    The cosine between a confident prediction and a uniform mean is 1 / sqrt(n_classes). The values published for EATA
    lie a little above it: 0.4 for 10 classes, 0.1 for 100, 0.05 for 1000. Their ratios to it are interpolated over
    log(n_classes) and constant outside of this range.
    """
    published = (10, 0.4), (100, 0.1), (1000, 0.05)
    factors = [value * math.sqrt(number) for number, value in published]
    place = min(max(math.log10(max(n_classes, 1)) - 1, 0.0), 2.0)
    low = min(int(place), 1)
    factor = factors[low] + (factors[low + 1] - factors[low]) * (place - low)
    return min(1.0, factor / math.sqrt(n_classes))


class ReliableSampleFilter:
    """Selects the samples to learn from: confident predictions that differ from those selected before.

    Args:
        margin: largest entropy of a confident prediction, in nats.
        redundancy: largest absolute cosine between a prediction and the moving average of those selected before.

    Source: EATA (arXiv 2204.02610), equations 3 to 6.
    """

    def __init__(self, margin: float = math.inf, redundancy: float = math.inf) -> None:
        self.margin, self.redundancy = margin, redundancy
        self.mean: Tensor | None = None

    def choose(self, probabilities: Tensor) -> Tensor:
        """Positions of the samples to learn from; they enter the moving average.

        Args:
            probabilities: (B, n_classes).
        """
        reliable = entropy_of(probabilities) < self.margin
        if self.mean is not None:
            similarity = F.cosine_similarity(probabilities, self.mean[None], dim=-1).abs()
            reliable &= similarity < self.redundancy
        chosen = reliable.nonzero().squeeze(-1)
        if len(chosen):
            new = probabilities[chosen].mean(0)
            self.mean = new if self.mean is None else 0.9 * self.mean + 0.1 * new
        return chosen

    def reset(self) -> None:
        """Forget what was selected."""
        self.mean = None


@dataclass(frozen=True, eq=False)
class FisherPenalty:
    """Penalty on the distance of scale and shift from their start, weighted by Fisher information (as in EWC and EATA).

    Args:
        parameters: scale and shift, as they change.
        start: their values at the start.
        importance: of each value, with a mean of one over all.
    """

    parameters: tuple[nn.Parameter, ...]
    start: tuple[Tensor, ...]
    importance: tuple[Tensor, ...]

    def value(self) -> Tensor:
        """Sum over all values of importance x (value - start)^2."""
        pairs = zip(self.importance, self.parameters, self.start, strict=True)
        return torch.stack([(i * (p - s).square()).sum() for i, p, s in pairs]).sum()


def fisher_penalty(model: nn.Module, samples: Samples, batch: int, batch_statistics: bool = False) -> FisherPenalty:
    """The penalty around the present values, weighted by the Fisher information of the model's own pseudo labels.

    F = mean over batches of the squared gradient of the batch's mean cross entropy: the definition of the authors'
    code, which is not the Fisher information per sample. It is divided by its mean, so that a weight of the penalty
    suits models and batches of any size.

    Cost: one forward and one backward pass per sample.
    """
    parameters = norm_parameters(model)
    total = [torch.zeros_like(p) for p in parameters]
    with learning(model, batch_statistics):
        for index in pieces(len(samples), batch):
            logits = predict(model, samples.trimmed(index, parameters[0].device))
            loss = F.cross_entropy(logits, logits.detach().argmax(-1))
            for summed, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                summed += 0 if gradient is None else gradient.square()
    mean = torch.cat([summed.flatten() for summed in total]).mean().clamp_min(1e-30)
    start = tuple(p.detach().clone() for p in parameters)
    return FisherPenalty(tuple(parameters), start, tuple(summed / mean for summed in total))


class Adaptation:
    """A model that learns from every batch it predicts, without labels.

    Args:
        model: is changed in place by steps, scale and shift of its normalisation layers alone; between steps it is an
            ordinary model in the mode in which it came.
        loss: what a step minimises.
        lr: learning rate.
        optimizer: "adam", or "sgd" with momentum 0.9.
        selection: chooses the samples to learn from; None takes all.
        separate_forward: the loss runs the samples once more by itself, in another way than the prediction did.
        batch_statistics: batch normalisation takes the statistics of the batch instead of those it holds.

    Raises:
        InvalidValueError: the model has no normalisation layer with scale and shift, or no such optimizer is known.

    Example:
        >>> from ttmpd.training.losses import entropy
        >>> from ttmpd.testing.tiny_models import tiny_model, tiny_samples
        >>> service = Adaptation(tiny_model(), lambda before, rerun, step: entropy(rerun()).mean())
        >>> for batch in tiny_samples(12).batches(6):
        ...     logits = service.step(batch)
        >>> service.reset()
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float = 1e-3,
        optimizer: str = "adam",
        selection: ReliableSampleFilter | None = None,
        separate_forward: bool = False,
        batch_statistics: bool = False,
    ) -> None:
        self.model, self.loss, self.lr, self.optimizer_name = model, loss, lr, optimizer
        self.selection, self.separate_forward, self.batch_statistics = selection, separate_forward, batch_statistics
        self.parameters = norm_parameters(model)
        if not self.parameters:
            raise InvalidValueError(
                f"{type(model).__name__} must have a normalisation layer with scale and shift, but has none; "
                "answer with it as it is"
            )
        self._start = self.state()
        self._begin()

    def _begin(self) -> None:
        self.optimizer = _optimizer(self.optimizer_name, self.parameters, self.lr)
        self.steps = self.n_seen = self.n_selected = self.n_forward = self.n_backward = 0

    def step(self, batch: Tensor) -> Tensor:
        """The logits of the batch, (B, n_classes), from before the step that is then made on it.

        No step is made where no sample is selected or the loss is not finite. A lone sample has no statistics of its
        own: where steps use those of the batch, it is answered with the statistics that the model holds.

        Cost: one forward pass per sample; one backward pass per selected sample, and with a selection one more forward
        pass for these.
        """
        self.n_seen += len(batch)
        lone = self.batch_statistics and len(batch) < 2
        if self.selection is None and not lone:
            return self.learn(batch)
        with learning(self.model, self.batch_statistics and not lone):
            with torch.no_grad():
                before = self._run(batch)
            if self.selection is not None and not lone:
                self._learn_from(batch, before, self.selection.choose(before.float().softmax(-1)))
        return before

    def learn(self, batch: Tensor) -> Tensor:
        """The logits of a batch that was selected already, from before the step that is made on all of it.

        Cost: one forward and one backward pass per sample; two forward passes where the loss runs them anew.
        """
        self.n_selected += len(batch)
        with learning(self.model, self.batch_statistics):
            with torch.set_grad_enabled(not self.separate_forward):
                logits = self._run(batch)
            rerun = (lambda: self._run(batch)) if self.separate_forward else (lambda: logits)
            self._learn(logits.detach(), rerun, len(batch))
        return logits.detach()

    def _run(self, batch: Tensor) -> Tensor:
        self.n_forward += len(batch)
        return predict(self.model, batch)

    def _learn_from(self, batch: Tensor, before: Tensor, chosen: Tensor) -> None:
        self.n_selected += len(chosen)
        # Statistics need two samples; where steps use those of the batch, they are now those of the selected.
        if len(chosen) > self.batch_statistics:
            self._learn(before[chosen], lambda: self._run(batch[chosen]), len(chosen))

    def _learn(self, before: Tensor, rerun: Rerun, n_backward: int) -> None:
        loss = self.loss(before, rerun, self.steps)
        self.steps += 1
        if bool(torch.isfinite(loss.detach())):
            self.n_backward += n_backward
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def charge(self, n_samples: int) -> None:
        """Count a forward and a backward pass of so many samples that were made for the loss, outside of steps."""
        self.n_forward += n_samples
        self.n_backward += n_samples

    def state(self) -> list[Tensor]:
        """A copy of scale and shift, for :meth:`load`."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def load(self, state: list[Tensor]) -> None:
        """Set scale and shift to an earlier state."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state, strict=True):
                parameter.copy_(value)

    def reset(self) -> None:
        """Back to the beginning: weights, optimizer, what was selected, and all counts."""
        self.load(self._start)
        if self.selection is not None:
            self.selection.reset()
        self._begin()


def _optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    check_optimizer("optimizer", name)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def check_optimizer(name: str, value: str) -> None:
    """Raise :class:`InvalidValueError` unless ``value`` is a known optimizer."""
    if value not in OPTIMIZERS:
        raise InvalidValueError(f"{name} must be one of {', '.join(OPTIMIZERS)}, but got {value!r}")
