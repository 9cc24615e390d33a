"""Pure tensor functions: no models, no state."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ttmpd.tasks._measures import entropy as entropy
from ttmpd.tasks._measures import mutual_information as mutual_information
from ttmpd.tasks._measures import soft_label_loss as soft_label_loss


def feature_loss(student: Tensor, teacher: Tensor, variance: float) -> Tensor:
    """Mean squared error in units of the teacher's variance: 1.0 is as bad as predicting the mean.

    Args:
        student: (B, ...) features.
        teacher: features of the same shape.
        variance: mean variance of the teacher's features over samples.
    """
    return F.mse_loss(student.float(), teacher.float()) / variance


def entropy_of(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis of probabilities, which may hold zeros."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)


def feature_variance(features: Tensor) -> float:
    """Mean variance over samples (first axis) of every feature, never zero."""
    if len(features) < 2:
        return max(float(features.float().square().mean()), 1e-12)
    return max(float(torch.var(features.float(), dim=0, unbiased=False).mean()), 1e-12)


def fused(full: Tensor, sub: Tensor, share: float) -> Tensor:
    """Probabilities of a network and of a part of it as one target: (full + (1 - share) sub) / (2 - share).

    Source: EATA-C (TPAMI 2025), as in a re-implementation that cites its equation 11.
    """
    return (full + (1 - share) * sub) / (2 - share)


def signed_entropy(full: Tensor, sub: Tensor) -> Tensor:
    """Entropy in nats of each row of ``sub``, negative where the two networks predict different classes.

    Minimising it makes the part more confident where the two agree, and less confident where they do not.

    Args:
        full: (B, n_classes) logits of the whole network.
        sub: (B, n_classes) logits of a part of it.

    Source: EATA-C (TPAMI 2025), as in a re-implementation that cites its equation 14.
    """
    return entropy(sub) * (2.0 * (full.argmax(-1) == sub.argmax(-1)) - 1.0)
