"""How teacher and student answer the held-out samples, for the report: agreement, classes, where they differ."""

import base64
import io
from dataclasses import dataclass

import torch
from torch import Tensor

from ttmpd.artifact.measurements import Disagreement, HeldOut
from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.models.opened import OpenedModel
from ttmpd.quality.proportion import Proportion, proportion
from ttmpd.tasks.base import OneOf, Task

MAX_COUNTED = 20_000
"""Most classes whose predictions are counted one by one; a larger vocabulary would fill the report with numbers."""
MAX_DISAGREEMENTS = 12
"""Most samples shown on which student and teacher differ."""
MAX_PIXELS = 112
"""Longest side of their pictures."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Outputs of two models for the held-out samples.

    Args:
        task: what is predicted.
        samples: (N, ...) the held-out samples.
        teacher: (rows, values) outputs of the teacher.
        student: (rows, values) outputs of the student.
    """

    task: Task
    samples: Samples
    teacher: Tensor
    student: Tensor


def agreement_of(predictions: Predictions) -> Proportion | None:
    """The share of predictions that are the same, with its interval; None without samples."""
    n = len(predictions.teacher)
    if not n:
        return None
    return proportion(round(predictions.task.agreement(predictions.student, predictions.teacher) * n), n)


def held_out_of(predictions: Predictions) -> HeldOut:
    """Classes and confidences of both models, as far as the task has them."""
    task, names = predictions.task, predictions.samples.names
    by_sample = len(predictions.teacher) == len(predictions.samples)
    is_counted = isinstance(task, OneOf) and (by_sample or predictions.teacher.shape[-1] <= MAX_COUNTED)
    outputs = (predictions.teacher, predictions.student)
    teacher, student = (_classes(task, values) if is_counted else () for values in outputs)
    confidences = [_confidence(task, values) for values in outputs]
    return HeldOut(tuple(map(str, names)) if by_sample else (), teacher, student, *confidences)


def _classes(task: Task, outputs: Tensor) -> tuple[int, ...]:
    return tuple(task.split(outputs)[0].argmax(-1).tolist()) if len(outputs) else ()


def _confidence(task: Task, outputs: Tensor) -> tuple[float, ...]:
    confidence = task.confidence(outputs) if len(outputs) else None
    return () if confidence is None else tuple(confidence.tolist())


def disagreements_of(predictions: Predictions, opened: OpenedModel) -> tuple[Disagreement, ...]:
    """The held-out samples to which student and teacher give different classes, the surest student first."""
    task, samples = predictions.task, predictions.samples
    if not len(samples) or not isinstance(task, OneOf) or task.each != "sample":
        return ()
    outputs = (predictions.teacher, predictions.student)
    teacher, student = (task.split(values)[0].softmax(-1).max(-1) for values in outputs)
    numbers = torch.nonzero(teacher.indices != student.indices).flatten().tolist()
    numbers.sort(key=lambda number: -float(student.values[number]))
    return tuple(
        Disagreement(
            name=str(samples.names[number]) if samples.names else str(number),
            teacher=int(teacher.indices[number]),
            student=int(student.indices[number]),
            teacher_confidence=float(teacher.values[number]),
            student_confidence=float(student.values[number]),
            png=_png(samples, number),
            text=_text(samples, number, opened),
        )
        for number in numbers[:MAX_DISAGREEMENTS]
    )


def _text(samples: Samples, number: int, opened: OpenedModel) -> str:
    """What the model read of a text; "" when it is none."""
    if not (samples.is_text and isinstance(opened.preprocessing, Tokenization)):
        return ""
    return opened.preprocessing.text_of(samples.inputs[number])


def _png(samples: Samples, number: int) -> str:
    """A small picture of a sample, base64; "" when it is no image."""
    from torchvision.transforms.functional import to_pil_image

    pixels = samples.inputs[number]
    if not samples.is_image or pixels.dtype != torch.uint8:
        return ""
    image = to_pil_image(pixels)
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
