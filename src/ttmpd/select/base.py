"""The contract of a selector, and what several selectors read from the teacher."""

import abc
import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.method import Method, check_range
from ttmpd.models.run import evaluating, predict
from ttmpd.models.taps import Tap, find_feature_tap, tapped
from ttmpd.models.tokens import predicted_token_mask
from ttmpd.progress import track
from ttmpd.tasks.base import check_one_class
from ttmpd.training.task import task_of


class Selector(Method, abc.ABC):
    """Chooses, from a larger pool, the samples that the student is fitted on."""

    uses_teacher: ClassVar[bool] = True
    """True where it runs the teacher on the samples. One that does not needs no pool larger than what it chooses."""

    def select(
        self,
        teacher: nn.Module,
        pool: Samples,
        n: int,
        *,
        labels: Tensor | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> tuple[int, ...]:
        """Positions in the pool: ``n`` different ones, ascending; all of them when the pool holds no more.

        Args:
            teacher: on the device where it shall run; left untouched.
            pool: unlabelled samples from the place of use.
            n: how many to choose.
            labels: (len(pool),) classes; without them the teacher's prediction stands for the label.
            batch_size: samples per pass.
            seed: of everything random.

        Raises:
            InvalidValueError: ``n`` is not positive, or ``labels`` are not one per sample.
            UnsupportedError: the method cannot treat this teacher, e.g. one that predicts each token of a text.
        """
        check_range("n", n, 1)
        if labels is not None and labels.shape != (len(pool),):
            raise InvalidValueError(
                f"labels must be one class per sample, ({len(pool)},), but got the shape {tuple(labels.shape)}"
            )
        if n >= len(pool):
            return tuple(range(len(pool)))
        if self.uses_teacher and predicted_token_mask(teacher, pool.inputs[:1]) is not None:
            raise UnsupportedError(
                f"a selector must have one answer per sample, but {type(teacher).__name__} answers each token; "
                "use random"
            )
        if self.uses_teacher:
            check_one_class(task_of(teacher), "a selector", "use random")
        return tuple(sorted(self.choose(teacher, pool, n, labels, batch_size=batch_size, seed=seed)))

    @abc.abstractmethod
    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """``n`` different positions in any order; ``n`` is less than the pool holds. Arguments as :meth:`select`."""


def top_n(values: Tensor, n: int) -> list[int]:
    """Positions of the ``n`` highest values, highest first; equal ones in their order, NaN after all others.

    Example:
        >>> top_n(torch.tensor([0.1, float("nan"), 0.9, 0.1]), 3)
        [2, 0, 3]
    """
    plain = values.tolist()
    keys = [(math.isnan(value), 0.0 if math.isnan(value) else -value) for value in plain]
    return sorted(range(len(plain)), key=keys.__getitem__)[:n]


def classes_of(logits: Tensor, labels: Tensor | None) -> Tensor:
    """(N,) the labels, on the device of the logits, or the answers that stand for them."""
    return logits.argmax(-1) if labels is None else labels.to(logits.device).long()


def error_norm(logits: Tensor, labels: Tensor | None) -> Tensor:
    """(N,) Euclidean distance between probabilities and the one-hot label: EL2N of one network."""
    probabilities = logits.float().softmax(-1)
    truth = nn.functional.one_hot(classes_of(logits, labels), logits.shape[-1])
    distance: Tensor = torch.linalg.vector_norm(probabilities - truth, dim=-1)
    return distance


def head_tap(teacher: nn.Module, pool: Samples) -> Tap | None:
    """The input of the layer that gives the logits; None where no single layer gives them."""
    device = next(teacher.parameters()).device
    for number in range(min(len(pool), 8)):  # the head is not recognised by a sample that is answered with NaN
        tap = find_feature_tap(teacher, pool.batch(slice(number, number + 1), device), pooled=True)
        if tap is not None:
            return tap
    return None


def answers(teacher: nn.Module, pool: Samples, tap: Tap | None, batch_size: int) -> tuple[Tensor, Tensor]:
    """(N, n_classes) logits and (N, width) features at ``tap``, both on the CPU; without a tap the logits twice."""
    device = next(teacher.parameters()).device
    taps = {} if tap is None else {"features": tap}
    logits, features = [], []
    n_batches = math.ceil(len(pool) / batch_size)
    with evaluating(teacher), tapped(teacher, taps) as read:
        for batch in track(pool.batches(batch_size, device), "select", n_batches):
            logits.append(predict(teacher, batch).float().cpu())
            features.append(read["features"].flatten(1).float().cpu() if tap else logits[-1])
    return torch.cat(logits), torch.cat(features)
