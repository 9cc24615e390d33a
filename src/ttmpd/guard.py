"""The guard of distillation: the head stays frozen, and held-out agreement with the teacher decides what is kept."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ttmpd.losses import soft_label_loss
from ttmpd.modules import call, evaluating, find_head, module_at
from ttmpd.records import Samples, Targets
from ttmpd.training import Check


def freeze_head(student: nn.Module, batch: Tensor) -> list[nn.Parameter]:
    """Stop training the layer that gives the logits; returns the parameters that were training before."""
    head = find_head(student, batch)
    if head is None:
        return []
    frozen = [p for p in module_at(student, head).parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def logits_of(model: nn.Module, samples: Samples, batch_size: int) -> Tensor:
    """(N, n_classes) logits of all samples, in eval mode, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        answers = [call(model, batch).float().cpu() for batch in samples.batches(batch_size, device)]
    return torch.cat(answers) if answers else torch.empty(0)


def held_out_check(
    student: nn.Module, held_out: Samples, targets: Targets, batch_size: int
) -> Callable[[], Check] | None:
    """A check of the student against the stored answers on the held-out samples; None when there are none."""
    if not len(held_out):
        return None

    def check() -> Check:
        logits = logits_of(student, held_out, batch_size)
        alike = float((logits.argmax(-1) == targets.held_out.argmax(-1)).float().mean())
        return Check(alike, float(soft_label_loss(logits, targets.held_out)), len(held_out))

    return check
