"""From ids and files to a trained student in a folder: open, hold back, train, measure, write."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.artifact.measurements import Lesson
from ttmpd.artifact.run_report import Adaptation, RunReport, RuntimeReport
from ttmpd.artifact.write import Result, check_output
from ttmpd.data.labels import open_labels
from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import predicts_per_token
from ttmpd.errors import SamplesError, UnsupportedError
from ttmpd.latency.device import choose_device, machine
from ttmpd.method import check_range
from ttmpd.models.modules import clone
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.pipeline.report_data import (
    installed_version,
    method_reports,
    model_report,
    now,
    plain_settings,
    samples_report,
    student_report,
    task_report,
    training_report,
)
from ttmpd.quality.proportion import Proportion, proportion
from ttmpd.records import Plan
from ttmpd.runtimes.eager import Eager
from ttmpd.storage import disk_guarded, locked
from ttmpd.students.train import WORK, StudentResult, train_student
from ttmpd.tasks.base import check_one_class
from ttmpd.training.task import assign_task, task_of


@dataclasses.dataclass(frozen=True, eq=False)
class StudentRun:
    """What became of a run.

    Args:
        trained: the student.
        n_samples: how many samples it could have been trained on.
        accuracy: of the student on the held-out samples; None when none were held out.
        teacher: the same of the teacher, as it taught; None without one.
        folder: where everything lies.
    """

    trained: StudentResult
    n_samples: int
    accuracy: Proportion | None
    teacher: Proportion | None
    folder: Path


def run_student(
    student: OpenedModel,
    data: str,
    labels: Path | None,
    output: Path,
    *,
    teacher: OpenedModel | None = None,
    holdout: float = 0.15,
    num_samples: int | None = None,
    device: str = "auto",
    resume: bool = False,
    command: str = "",
    **settings: Any,
) -> StudentRun:
    """Train a student on a part of labelled data and write it to a folder.

    Args:
        student: trained from the weights that it has.
        data: a folder of images, a .npz or .npy file.
        labels: a .csv or .npz file; None takes ``y`` from a .npz ``data``.
        output: made if missing.
        teacher: see :func:`ttmpd.train_student`.
        holdout: share of the samples that is drawn at random and only measured on.
        num_samples: take no more than this many of the data, drawn at random; they are held in memory.
        device: "auto", "cpu", "cuda", "mps".
        resume: go on with what a killed run left in ``output``.
        command: recorded in the report.
        **settings: fields of :class:`ttmpd.students.recipe.Recipe`.

    Raises:
        SamplesError: nothing usable is there, or a sample has no label.
        InvalidValueError: as :func:`ttmpd.train_student`; or ``output`` holds other files.
    """
    check_range("holdout", holdout, 0.0, 0.9)
    check_output(output)
    where, seed = choose_device(device), int(settings.get("seed", 0))
    net = clone(student.module).to(where)
    guide = None if teacher is None else clone(teacher.module).to(where).eval()
    samples, teacher_samples = _opened(data, student, teacher, num_samples, seed)
    task = assign_task(net, samples.first(2).trimmed(slice(None), where), None, student.preprocessing)
    check_one_class(task, "a file of labels", "call ttmpd.train_student in Python with labels of another shape")
    truth = open_labels(labels, data).of(samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    n_held = round(holdout * len(samples))
    held, rest = order[:n_held], sorted(order[n_held:])
    with locked(output), disk_guarded(output):
        if not resume:
            shutil.rmtree(output / WORK, ignore_errors=True)
        trained = train_student(
            net, samples.subset(rest), truth[rest], teacher=guide, teacher_samples=teacher_samples.subset(rest),
            folder=output, **settings,
        )  # fmt: skip
        accuracy = _accuracy(trained.model, samples.subset(held), truth[held])
        teacher_accuracy = None
        if trained.teacher is not None:
            teacher_accuracy = _accuracy(trained.teacher, teacher_samples.subset(held), truth[held])
        fit = samples.subset(rest)
        lesson = _lesson(trained, fit, teacher, accuracy, teacher_accuracy)
        report = dataclasses.replace(
            _report(trained, student, fit, n_held, lesson),
            settings={"holdout": holdout, "device": str(where), **plain_settings(trained.recipe)},
            command=command,
        )
        ids = tuple(fit.ids[place] for place in trained.selected)
        result = Result(trained.model.cpu(), Plan((), 0.0, 0.0, 0.0, 0.0), report, ids, student)
        result.save(output)
        shutil.rmtree(output / WORK, ignore_errors=True)
    return StudentRun(trained, len(fit), accuracy, teacher_accuracy, output)


def _opened(
    data: str, student: OpenedModel, teacher: OpenedModel | None, n: int | None, seed: int
) -> tuple[Samples, Samples]:
    """The samples as the student wants them, and the same ones as the teacher wants them."""
    for one in (student, teacher):
        if one is not None and predicts_per_token(one.preprocessing):
            raise UnsupportedError(
                f"a student must learn one class per sample, but {type(one.module).__name__} answers each token"
            )
    teacher_form = student.preprocessing if teacher is None else teacher.preprocessing or student.preprocessing
    student_form = student.preprocessing or teacher_form
    samples = open_samples(data, student_form, num_samples=n, seed=seed)
    if teacher_form == student_form:
        return samples, samples
    teacher_samples = open_samples(data, teacher_form, num_samples=n, seed=seed)
    if teacher_samples.ids != samples.ids:
        raise SamplesError(
            "student and teacher must be able to use the same samples, but one skips some that the other takes; take "
            "images out that are too small for either"
        )
    return samples, teacher_samples


def _accuracy(model: nn.Module, samples: Samples, truth: Tensor) -> Proportion | None:
    """Share of right predictions with its Wilson interval; None without samples."""
    if not len(samples):
        return None
    right = task_of(model).right(predictions_of(model, samples, 64), truth)
    return None if right is None else proportion(int(right.sum()), len(samples))


def _lesson(
    trained: StudentResult,
    samples: Samples,
    teacher: OpenedModel | None,
    accuracy: Proportion | None,
    teacher_accuracy: Proportion | None,
) -> Lesson:
    """What the student was trained on, and how good both are."""
    return Lesson(
        teacher=teacher.id if teacher else "",
        alpha=trained.alpha,
        n_samples=len(samples),
        sample_names=tuple(str(samples.names[place]) for place in trained.selected),
        n_views=trained.n_views,
        accuracy=accuracy,
        teacher_accuracy=teacher_accuracy,
    )


def _report(
    trained: StudentResult, student: OpenedModel, samples: Samples, n_held_out: int, lesson: Lesson
) -> RunReport:
    """What the training measured, all but the settings."""
    device, methods = next(trained.model.parameters()).device, method_reports(trained.recipe)
    batch = samples.trimmed(slice(0, 2), device)
    eager = Eager()
    return RunReport(
        kind="student",
        version=installed_version(),
        created=now(),
        seed=trained.recipe.seed,
        model=model_report(student, trained.model, batch),
        student=student_report(trained.model, batch),
        task=task_report(trained.model, detected=True),
        machine=machine(device),
        runtime=RuntimeReport(eager.name, eager.version),
        settings={},
        methods=methods if lesson.teacher else {"select": methods["select"]},
        samples=samples_report(samples, n_held_out, batch.shape[1:]),
        class_names=tuple(student.class_names),
        seconds=dict(trained.seconds),
        adaptation=Adaptation(trained.adapt_note) if lesson.teacher else None,
        training=training_report(trained.fit),
        lesson=lesson,
    )
