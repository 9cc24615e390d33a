"""From ids and files to a trained student in a folder: open, hold back, train, measure, write."""

import dataclasses
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.artifact.write import Result, check_output, write_artifact
from ttmpd.data.labels import open_labels
from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import predicts_per_token
from ttmpd.errors import SamplesError, UnsupportedError
from ttmpd.latency.device import choose_device, machine
from ttmpd.method import check_range
from ttmpd.models.modules import clone
from ttmpd.models.open import is_rebuildable
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.quality.proportion import Proportion, proportion
from ttmpd.records import Plan
from ttmpd.storage import disk_guarded, locked, write_json
from ttmpd.students.train import WORK, StudentResult, train_student

REPORT, CARD = "report.json", "README.md"


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
    samples, seen = _opened(data, student, teacher, num_samples, seed)
    truth = open_labels(labels, data).of(samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    n_held = round(holdout * len(samples))
    held, rest = order[:n_held], sorted(order[n_held:])
    with locked(output), disk_guarded(output):
        if not resume:
            shutil.rmtree(output / WORK, ignore_errors=True)
        trained = train_student(
            net, samples.subset(rest), truth[rest], teacher=guide, teacher_samples=seen.subset(rest), folder=output,
            **settings,
        )  # fmt: skip
        accuracy = _accuracy(trained.model, samples.subset(held), truth[held])
        taught = None if trained.teacher is None else _accuracy(trained.teacher, seen.subset(held), truth[held])
        found = StudentRun(trained, len(rest), accuracy, taught, output)
        names = [samples.names[rest[place]] for place in trained.selected]
        facts = _facts(found, student, teacher, settings={"holdout": holdout, "device": str(where)})
        result = _result(found, facts | {"command": command, "kept": names}, student, samples.subset(rest))
        card = _card(found, result.facts, student.id)
        write_artifact(output, result, lambda folder: _write_reports(folder, result, card))
        shutil.rmtree(output / WORK, ignore_errors=True)
    return found


def _opened(
    data: str, student: OpenedModel, teacher: OpenedModel | None, n: int | None, seed: int
) -> tuple[Samples, Samples]:
    """The samples as the student wants them, and the same ones as the teacher wants them."""
    for one in (student, teacher):
        if one is not None and predicts_per_token(one.preprocessing):
            raise UnsupportedError(
                f"a student must learn one class per sample, but {type(one.module).__name__} answers each token"
            )
    theirs = student.preprocessing if teacher is None else teacher.preprocessing or student.preprocessing
    ours = student.preprocessing or theirs
    samples = open_samples(data, ours, num_samples=n, seed=seed)
    if theirs == ours:
        return samples, samples
    seen = open_samples(data, theirs, num_samples=n, seed=seed)
    if seen.ids != samples.ids:
        raise SamplesError(
            "student and teacher must be able to use the same samples, but one skips some that the other takes; take "
            "images out that are too small for either"
        )
    return samples, seen


def _accuracy(model: nn.Module, samples: Samples, truth: Tensor) -> Proportion | None:
    """Share of right answers with its Wilson interval; None without samples."""
    if not len(samples):
        return None
    right = int((predictions_of(model, samples, 64).argmax(-1) == truth).sum())
    return proportion(right, len(samples))


def _facts(
    found: StudentRun, student: OpenedModel, teacher: OpenedModel | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything about the run as plain data."""
    trained = found.trained
    return {
        "student": student.id,
        "teacher": None if teacher is None else teacher.id,
        "adapt": trained.adapt_note,
        "recipe": trained.recipe.to_dict() | {"alpha": trained.alpha},
        "settings": settings,
        "n_samples": found.n_samples,
        "n_kept": len(trained.selected),
        "n_views": trained.n_views,
        "steps": trained.fit.steps,
        "seconds": dict(trained.seconds),
        "accuracy": None if found.accuracy is None else dataclasses.asdict(found.accuracy),
        "teacher_accuracy": None if found.teacher is None else dataclasses.asdict(found.teacher),
    }


def _result(found: StudentRun, facts: dict[str, Any], student: OpenedModel, samples: Samples) -> Result:
    """The student as an artifact from which nothing was removed."""
    shape = list(samples.inputs.shape[1:])
    described = facts | {
        "ttmpd": installed_version("ttmpd"),
        "machine": machine(facts["settings"]["device"]),
        "samples": {"input_shape": shape},
    }
    ids = tuple(samples.ids[place] for place in found.trained.selected)
    return Result(found.trained.model.cpu(), Plan((), 0.0, 0.0, 0.0, 0.0), described, ids, student, kind="student")


def _write_reports(folder: Path, result: Result, card: str) -> None:
    (folder / CARD).write_text(card, encoding="utf-8")
    write_json(folder / REPORT, result.facts)


def _card(found: StudentRun, facts: dict[str, Any], model_id: str) -> str:
    """What this is, how good it is, how to load it."""
    trained, accuracy = found.trained, found.accuracy
    source, own = ("", "") if is_rebuildable(model_id) else (f" --source {model_id}", ", model=net")
    taught = f", with the answers of `{facts['teacher']}` at a weight of {trained.alpha:g}" if trained.alpha else ""
    measured = "Nothing was held out: its accuracy is not known."
    if accuracy is not None:
        measured = (
            f"Accuracy on {accuracy.n} held-out samples of the same data: {accuracy.share:.1%} "
            f"(95 % interval {accuracy.low:.1%} to {accuracy.high:.1%})."
        )
    return (
        f"# Student\n\n`{model_id}`, trained for {trained.fit.steps} steps on {len(trained.selected)} of "
        f"{found.n_samples} labelled samples (chosen by `{trained.recipe.select.name}`){taught}.\n\n{measured}\n\n"
        f"```\nttmpd evaluate --model FOLDER{source} --data DATA --labels LABELS\n```\n\n"
        f"In Python: `ttmpd.load(folder{own})`.\n\n"
        f"`{REPORT}` holds all settings, the seconds of each stage and the names of the samples that were kept.\n"
    )
