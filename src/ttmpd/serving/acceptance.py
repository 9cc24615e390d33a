"""The acceptance test of a student: may it take over from the model that answers?"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.latency.timing import forward_call, interleaved
from ttmpd.models.modules import has_nan
from ttmpd.models.run import predict
from ttmpd.serving.policy import Policy
from ttmpd.training.task import task_of


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Result of the acceptance test of a student.

    Args:
        refused: reason for which it may not answer; "" when it may.
        agreement: share of the held-out samples on which it answers like the teacher.
        speedup: how many times faster than the teacher, median of interleaved rounds in this process.
    """

    refused: str
    agreement: float = 0.0
    speedup: float = 0.0


def accept(student: nn.Module, teacher: nn.Module, held_out: Samples, *, n_batch: int, policy: Policy) -> Acceptance:
    """Test a student before it answers in the teacher's place: same shape, finite, agreeing, faster.

    Args:
        student: as it would answer.
        teacher: what answers otherwise.
        held_out: samples that neither was fitted on.
        n_batch: samples of the batches on which both are timed: as many as callers send.
        policy: the floors.
    """
    expected, predicted = predictions_on(teacher, held_out), predictions_on(student, held_out)
    if predicted.shape != expected.shape:
        return Acceptance(f"it answers with the shape {tuple(predicted.shape)} in place of {tuple(expected.shape)}")
    if has_nan(predicted):
        return Acceptance("it answers with NaN or infinity")
    share = task_of(teacher).agreement(predicted, expected)
    if share < policy.min_agreement:
        why = f"it answers like the teacher on {share:.0%} of {len(held_out)} held-out samples"
        return Acceptance(f"{why}, but must on {policy.min_agreement:.0%}", share)
    speedup = _speedup(student, teacher, held_out, n_batch)
    if speedup <= policy.min_speedup:
        why = f"it was measured {speedup:.2f} times as fast as the teacher in this process"
        return Acceptance(f"{why}, but must be more than {policy.min_speedup:g} times as fast", share, speedup)
    return Acceptance("", share, speedup)


def _speedup(student: nn.Module, teacher: nn.Module, held_out: Samples, n_batch: int) -> float:
    batch = held_out.batch(torch.arange(n_batch) % len(held_out), device_of(teacher))
    calls = {"teacher": forward_call(teacher, batch), "student": forward_call(student, batch)}
    rounds = interleaved(calls, rounds=9, warmup=1, min_seconds=0.2, max_seconds=3.0)
    return rounds.ratio("teacher", "student").median_ms


def predictions_on(model: nn.Module, samples: Samples | Tensor, batch_size: int = 64) -> Tensor:
    """(rows, values) on the CPU of a frozen model; unlike ``evaluating`` it sets nothing that other threads use."""
    device = device_of(model)
    batches = samples.batches(batch_size, device) if isinstance(samples, Samples) else torch.split(samples, batch_size)
    with torch.no_grad():
        return torch.cat([predict(model, batch.to(device)).float().cpu() for batch in batches])


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def frozen(model: nn.Module) -> nn.Module:
    """The model in eval mode without gradients, in place: only callers' forward passes touch it from now on."""
    return model.eval().requires_grad_(False)
