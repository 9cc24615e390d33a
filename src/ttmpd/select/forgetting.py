"""Choose the samples that are forgotten most often while a perturbed copy of the teacher learns the pool."""

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.data.samples import Samples
from ttmpd.method import check_fields
from ttmpd.models.modules import clone
from ttmpd.models.run import evaluating, predict, predictions_of
from ttmpd.progress import track
from ttmpd.select.base import Selector, classes_of, top_n


class Forgetting(Selector):
    """Most flips from the label to another answer over a few epochs of learning from a perturbed start.

    A copy of the teacher gets noise on its weights and is then trained by cross entropy on the pool. Each time a sample
    is in the batch its answer is noted, before the step; the teacher's own answer is the first note. The score is the
    number of times that agreement with the label is followed by disagreement. Samples that never agree come first;
    equal scores are told apart by the mean probability of the label, the lower first.
    """

    source: ClassVar[str] = (
        "forgetting events of Toneva et al., ICLR 2019 (arXiv 1812.05159), on other training: a few epochs from a "
        "perturbed teacher with frozen normalisation statistics and no dropout, not a whole training from scratch; "
        "without labels the teacher's answer is the label; ties are broken"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    epochs: int = 4
    noise: float = 0.1
    """Standard deviation of the noise added to each weight matrix, in units of its root mean square."""
    lr: float = 0.01
    train_batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self, epochs=1, noise=0.0, lr=0.0, train_batch_size=1)

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """Cost: ``epochs`` forward and backward passes per sample, and one forward pass."""
        logits = predictions_of(teacher, pool, batch_size)
        classes = classes_of(logits, labels)
        finite = torch.isfinite(logits).all(-1)
        copy = clone(teacher)
        perturb(copy, self.noise, seed)
        agreed, confidence = self._watch(copy, pool, classes, finite.nonzero().squeeze(-1), seed)
        flips = forgotten(torch.stack([logits.argmax(-1) == classes, *agreed]))
        score = (
            flips.clamp(max=self.epochs + 1) + (1 - confidence) / 2
        )  # finite, so that those that never agree are ranked
        return top_n(torch.where(finite, score, math.nan), n)

    def _watch(
        self, copy: nn.Module, pool: Samples, classes: Tensor, usable: Tensor, seed: int
    ) -> tuple[list[Tensor], Tensor]:
        """Train the copy on the ``usable`` samples: (N,) agreement by epoch, and (N,) mean probability of the label."""
        device = next(copy.parameters()).device
        draw = torch.Generator().manual_seed(seed)
        agreed, confidence = [], torch.zeros(len(pool))
        with evaluating(copy, gradients=True):
            copy.requires_grad_(True)
            optimizer = torch.optim.SGD(copy.parameters(), lr=self.lr, momentum=0.9)
            for _ in track(range(self.epochs), "select", self.epochs):
                agreed.append(torch.zeros(len(pool), dtype=torch.bool))
                order = usable[torch.randperm(len(usable), generator=draw)]
                for start in range(0, len(order), self.train_batch_size):
                    index = order[start : start + self.train_batch_size]
                    logits = _step(copy, optimizer, pool.trimmed(index, device), classes[index].to(device))
                    right = torch.nan_to_num(logits.softmax(-1).gather(1, classes[index, None]).squeeze(1))
                    agreed[-1][index] = (logits.argmax(-1) == classes[index]) & (right > 0)
                    confidence[index] += right / self.epochs
        return agreed, confidence


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, classes: Tensor) -> Tensor:
    """The logits from before the step, on the CPU. No step is made where its gradient is not finite."""
    logits = predict(model, batch).float()
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(logits, classes).backward()  # type: ignore[no-untyped-call]
    if bool(torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0))):
        optimizer.step()
    return logits.detach().cpu()


def perturb(model: nn.Module, noise: float, seed: int) -> None:
    """Add to each weight matrix, in place, normal noise of ``noise`` times its root mean square."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                drawn = torch.randn(weight.shape, generator=draw).to(weight)
                weight.add_(noise * weight.square().mean().sqrt() * drawn)


def forgotten(agreed: Tensor) -> Tensor:
    """(N,) number of times that agreement is followed by disagreement; inf where there never was agreement.

    Args:
        agreed: (T, N) true where the prediction was the label, in the order of time.

    Example:
        >>> forgotten(torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]]).bool())
        tensor([2., 0., inf])
    """
    flips = (agreed[:-1] & ~agreed[1:]).sum(0).float()
    return torch.where(agreed.any(0), flips, math.inf)
