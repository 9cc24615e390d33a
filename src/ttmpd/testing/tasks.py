"""Contract checks of a task."""

from typing import Any

import torch
from torch import Tensor

from ttmpd.tasks.base import Task

SHAPES: tuple[tuple[int, ...], ...] = ((6, 4), (6, 5, 4), (6, 4, 3, 3))
"""Outputs of models: one row per sample, per token, per pixel."""


def _example(task: Task) -> tuple[Task, Tensor]:
    """The task resolved on the first shape that it can read, and (rows, values) of random predictions."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        raw: Any = torch.randn(shape, generator=generator)
        inputs = torch.ones(shape[:2], dtype=torch.long) if len(shape) == 3 else torch.zeros(6, 3)
        try:
            resolved = task.resolved(raw, inputs)
            return resolved, resolved.outputs(raw, inputs)
        except Exception:  # another shape is its own
            continue
    raise AssertionError(f"{task.name} must read one of the shapes {SHAPES}")


def check_itself_is_best(task: Task) -> None:
    """A model agrees with itself: agreement 1, no gradient, and a smaller loss than that of a perturbed model."""
    task, outputs = _example(task)
    student = outputs.clone().requires_grad_()
    task.loss(student, outputs).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-5, "the loss must be least where nothing differs"
    assert task.agreement(outputs, outputs) == 1.0
    moved = outputs + 2 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    assert float(task.loss(moved, outputs)) > float(task.loss(outputs, outputs)) + 1e-3
    assert 0.0 <= task.agreement(moved, outputs) < 1.0
    assert task.held_out_loss(moved, outputs) > task.held_out_loss(outputs, outputs)


def check_rows_are_counted(task: Task) -> None:
    """The rows of a batch are those that are counted for its samples, and confidences lie from 0 to 1."""
    task, outputs = _example(task)
    assert outputs.dim() == 2
    confidence = task.confidence(outputs)
    if confidence is not None:
        assert confidence.shape == (len(outputs),)
        assert bool(((confidence >= 0) & (confidence <= 1)).all())
    assert task.alike(outputs, outputs).shape == (len(outputs),)
    assert bool(task.same), "what counts as the same must be said"


def check_adaptation_is_refused_or_measured(task: Task) -> None:
    """Either predictions have an entropy and an information, or a sentence says why not."""
    task, outputs = _example(task)
    if task.reason_not_to_adapt:
        return
    assert task.uncertainty(outputs).shape == (len(outputs),)
    assert bool(torch.isfinite(task.information(outputs)))
    confident = task.uncertainty(outputs * 20).mean()
    assert confident < task.uncertainty(outputs).mean(), "confident predictions must have less entropy"


CHECKS = (check_itself_is_best, check_rows_are_counted, check_adaptation_is_refused_or_measured)
