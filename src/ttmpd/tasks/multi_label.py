"""Several labels per sample, each there or not."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ttmpd.errors import InvalidValueError
from ttmpd.tasks._measures import binary_entropy, binary_information, plain_numbers
from ttmpd.tasks.base import Clues, Task, as_rows


class MultiLabel(Task):
    """Several labels for each sample, each of them there or not: one logit per label, read by a sigmoid."""

    source: ClassVar[str] = "binary cross entropy with the teacher's probabilities as soft labels"
    same: ClassVar[str] = "the share of labels that both set or both leave out"

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """A configuration that says so; the shape is that of classes."""
        return ("config", cls()) if clues.problem_type == "multi_label_classification" else None

    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(B, n_labels) as it is."""
        return as_rows(value, self.name)

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """Mean binary divergence from the teacher's probabilities: cross entropy less what no student can avoid."""
        goal = teacher.float().sigmoid()
        crossed = F.binary_cross_entropy_with_logits(student.float(), goal, reduction="none").sum(-1)
        return (crossed - binary_entropy(teacher)).mean()

    def alike(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The share of labels on which both logits have the same sign."""
        return ((student > 0) == (teacher > 0)).float().mean(-1)

    def confidence(self, outputs: Tensor) -> Tensor | None:
        """Mean probability of what is said of each label."""
        p = outputs.sigmoid()
        return torch.maximum(p, 1 - p).mean(-1)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of right labels and mean binary cross entropy; ``labels`` is (rows, n_labels) of 0 and 1."""
        right = ((outputs > 0) == (labels > 0.5)).double().mean()
        crossed = F.binary_cross_entropy_with_logits(outputs.double(), labels.double())
        return {"right_labels": float(right), "binary_cross_entropy": float(crossed)}

    def check_labels(self, labels: Tensor, n_samples: int) -> None:
        """A 0 or 1 per label and sample."""
        n_labels = sum(self.widths)
        if labels.shape != (n_samples, n_labels) or not bool(((labels == 0) | (labels == 1)).all()):
            raise InvalidValueError(
                f"labels must be {n_labels} zeros or ones per sample, ({n_samples}, {n_labels}), but got the shape "
                f"{tuple(labels.shape)} with values from {float(labels.min()):g} to {float(labels.max()):g}"
            )

    def label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross entropy."""
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs))

    def signals(self, outputs: Tensor) -> dict[str, Tensor]:
        """Entropy, and the mean logit, which tells how many labels are set."""
        return {"entropy": binary_entropy(outputs), "mean logit": outputs.float().mean(-1)}

    def record(self, rows: Tensor, *, class_names: Sequence[str], top: int, scores: bool) -> dict[str, Any]:
        """The labels that are set, each with its probability, the likeliest first; all probabilities by position."""
        probabilities = rows[0].sigmoid()
        order = probabilities.argsort(descending=True, stable=True).tolist()
        labels = [
            {"label": n, "probability": float(probabilities[n])}
            | ({"name": class_names[n]} if n < len(class_names) else {})
            for n in order
            if probabilities[n] > 0.5
        ]
        return {"labels": labels[:top]} | ({"probabilities": plain_numbers(probabilities)} if scores else {})

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """Entropy of the sigmoids, summed over the labels."""
        return binary_entropy(outputs)

    def information(self, outputs: Tensor) -> Tensor:
        """Mutual information of each label with the samples, summed."""
        return binary_information(outputs)
