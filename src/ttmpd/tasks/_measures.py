"""Pure tensor functions that tasks share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_label_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean Kullback-Leibler divergence from the teacher's tempered probabilities, times temperature squared.

    Source: Hinton et al., 2015, section 2. Both arguments are logits of shape (B, n_classes).
    """
    log_student = F.log_softmax(student.float() / temperature, -1)
    log_teacher = F.log_softmax(teacher.float() / temperature, -1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row's softmax, (B,)."""
    log_p = F.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1)


def mutual_information(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction minus the mean entropy: high when predictions are sure *and* varied.

    Source: information maximisation, Krause et al., 2010. ``logits`` has the shape (N, n_classes).
    """
    mean = F.softmax(logits.float(), -1).mean(0)
    return -(mean * mean.clamp_min(1e-12).log()).sum() - entropy(logits).mean()


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row's sigmoids, summed over the labels, (B,)."""
    logits = logits.float()
    p = logits.sigmoid()
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).sum(-1)


def binary_information(logits: Tensor) -> Tensor:
    """Mutual information of each label with the sample, summed over the labels; ``logits`` is (N, n_labels)."""
    mean = logits.float().sigmoid().mean(0)
    return -(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum() - binary_entropy(logits).mean()


def r_squared(outputs: Tensor, labels: Tensor) -> float:
    """Share of the variance of ``labels`` that ``outputs`` explain, over all values; negative where they explain none.

    Example:
        >>> r_squared(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
        1.0
    """
    labels = labels.double()
    rest = (outputs.double() - labels).square().sum(0)
    total = (labels - labels.mean(0)).square().sum(0).clamp_min(1e-12)
    return float((1 - rest / total).mean())


def plain_numbers(values: Tensor) -> list[float | None]:
    """A list of floats, with None where a value is not finite, which JSON cannot say."""
    return [value if math.isfinite(value) else None for value in values.double().tolist()]


def class_record(logits: Tensor, class_names: Sequence[str], top: int, scores: bool) -> dict[str, Any]:
    """The likeliest class of (n_classes,) logits with its probability, the ``top`` likeliest, and all scores."""
    best = torch.softmax(logits, -1).topk(min(top, len(logits)))
    classes = [
        {"class": index, "probability": p} | ({"name": class_names[index]} if index < len(class_names) else {})
        for p, index in zip(plain_numbers(best.values), best.indices.tolist(), strict=True)
    ]
    return classes[0] | {"top": classes} | ({"scores": plain_numbers(logits)} if scores else {})
