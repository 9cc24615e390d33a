"""Whether a student may take over from the model that answers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.latency.timing import forward_call, interleaved
from ttmpd.models.modules import has_nan
from ttmpd.models.run import call
from ttmpd.serving.policy import Policy


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about a student before it may answer.

    Args:
        refused: why it may not; "" when it may.
        agreement: share of the held samples on which it answers like the teacher.
        speedup: how many times faster than the teacher, median of interleaved rounds in this process.
    """

    refused: str
    agreement: float = 0.0
    speedup: float = 0.0


def judged(student: nn.Module, teacher: nn.Module, held: Samples, *, n_batch: int, policy: Policy) -> Verdict:
    """Whether a student may answer in the teacher's place.

    Args:
        student: as it would answer.
        teacher: what answers otherwise.
        held: samples that neither was fitted on.
        n_batch: samples of the batches on which both are timed: as many as callers send.
        policy: the floors.
    """
    expected, found = logits_on(teacher, held), logits_on(student, held)
    if found.shape != expected.shape:
        return Verdict(f"it answers with the shape {tuple(found.shape)} in place of {tuple(expected.shape)}")
    if has_nan(found):
        return Verdict("it answers with NaN or infinity")
    share = alike(found, expected)
    if share < policy.min_agreement:
        why = f"it answers like the teacher on {share:.0%} of {len(held)} held samples"
        return Verdict(f"{why}, but must on {policy.min_agreement:.0%}", share)
    speedup = _speedup(student, teacher, held, n_batch)
    if speedup <= policy.min_speedup:
        why = f"it was measured {speedup:.2f} times as fast as the teacher in this process"
        return Verdict(f"{why}, but must be more than {policy.min_speedup:g} times as fast", share, speedup)
    return Verdict("", share, speedup)


def _speedup(student: nn.Module, teacher: nn.Module, held: Samples, n_batch: int) -> float:
    batch = held.batch(torch.arange(n_batch) % len(held), device_of(teacher))
    calls = {"teacher": forward_call(teacher, batch), "student": forward_call(student, batch)}
    rounds = interleaved(calls, rounds=9, warmup=1, min_seconds=0.2, max_seconds=3.0)
    return rounds.ratio("teacher", "student").median_ms


def alike(logits: Tensor, others: Tensor) -> float:
    """Share of rows with the same class."""
    return float((logits.argmax(-1) == others.argmax(-1)).float().mean())


def logits_on(model: nn.Module, samples: Samples | Tensor, batch_size: int = 64) -> Tensor:
    """(N, n_classes) logits on the CPU of a frozen model; other than ``evaluating``, nothing that others use is set."""
    device = device_of(model)
    batches = samples.batches(batch_size, device) if isinstance(samples, Samples) else torch.split(samples, batch_size)
    with torch.no_grad():
        return torch.cat([call(model, batch.to(device)).float().cpu() for batch in batches])


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def frozen(model: nn.Module) -> nn.Module:
    """The model in eval mode without gradients, in place: only callers' forward passes touch it from now on."""
    return model.eval().requires_grad_(False)
