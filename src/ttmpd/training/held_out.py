"""Held-out checks during training, and weights averaged with the start."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.models.run import predictions_of
from ttmpd.models.state import load_tensor_state, tensor_state
from ttmpd.training.loop import MIN_LOSS_GAIN, Check
from ttmpd.training.task import task_of
from ttmpd.training.teacher_outputs import TeacherOutputs


def held_out_check(
    student: nn.Module, held_out: Samples, targets: TeacherOutputs, batch_size: int
) -> Callable[[], Check] | None:
    """A check of the student against the stored answers on the held-out samples; None when there are none."""
    if not len(held_out):
        return None
    task = task_of(student)

    def check() -> Check:
        logits = predictions_of(student, held_out, batch_size)
        alike, loss = task.agreement(logits, targets.held_out), task.held_out_loss(logits, targets.held_out)
        return Check(alike, loss, len(held_out))

    return check


def mixture(end: Mapping[str, Tensor], start: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights interpolated linearly: (1 - share) end + share start; integer buffers are those of ``end``."""
    return {
        name: torch.lerp(value, start[name], share) if value.is_floating_point() else value.clone()
        for name, value in end.items()
    }


def mix_with_start(
    student: nn.Module, start: Mapping[str, Tensor], share: float, check: Callable[[], Check], end: Check
) -> bool:
    """Average the trained weights with the initial ones, unless the average is clearly worse on the held-out samples.

    Args:
        student: changed in place.
        start: its state before training.
        share: weight of the initial parameters; 0 leaves the student as it is.
        check: measures it.
        end: what the check said of it at the end of training.

    Returns:
        True where the average was taken.

    Source: WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903): the mean of the weights before and after
    fine-tuning is often better than both. Here without its choice of the share on labelled samples.
    """
    if not share:
        return False
    trained = {name: value.detach().clone() for name, value in tensor_state(student).items()}
    load_tensor_state(student, mixture(trained, start, share))
    if end.better_than(check(), by=MIN_LOSS_GAIN):
        load_tensor_state(student, trained)
        return False
    return True
