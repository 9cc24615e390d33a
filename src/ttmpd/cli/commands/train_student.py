"""``ttmpd train-student``: a student from a part of the labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import choose_methods
from ttmpd.cli.commands._reporting import command_line, reporting, show_machine
from ttmpd.errors import InvalidValueError
from ttmpd.pipeline import defaults

if TYPE_CHECKING:
    from ttmpd.models.opened import OpenedModel
    from ttmpd.students.run import StudentRun


PLACE = 70


def _option(name: str, text: str, section: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=section, **more)


Student = Annotated[str, _option("--student", f"The model to train: {option.MODEL_IDS}.", option.MODEL, metavar="ID")]
Teacher = Annotated[
    str | None, _option("--teacher", "A model id or an artifact folder to learn from.", option.MODEL, metavar="ID")
]
TeacherWeights = Annotated[
    Path | None,
    _option("--teacher-weights", "A .safetensors file for the teacher.", option.MODEL, metavar="FILE"),
]
NumSamples = Annotated[
    int | None, _option("--num-samples", "At most so many samples (default: all).", option.DATA, min=2, metavar="N")
]
Fraction = Annotated[
    float, _option("--fraction", "Share of the samples that is trained on.", option.DATA, metavar="SHARE")
]
Balanced = Annotated[bool, _option("--balanced", "The same number of each class, where there are.", option.DATA)]
Alpha = Annotated[
    str, _option("--alpha", "Weight of the teacher; auto: by the fraction.", option.METHODS, metavar="0..1|auto")
]
Temperature = Annotated[float, _option("--temperature", "Of the teacher's soft labels.", option.METHODS, metavar="T")]
Views = Annotated[
    int, _option("--views", "Fixed augmented views per sample; 1 for none.", option.METHODS, min=1, metavar="N")
]
Steps = Annotated[int, _option("--steps", "Optimizer steps, whatever the fraction.", option.RUN, min=1, metavar="N")]
BatchSize = Annotated[int, _option("--batch-size", "Samples per step.", option.RUN, min=2, metavar="N")]
Lr = Annotated[float, _option("--lr", "Peak learning rate of SGD.", option.RUN, metavar="LR")]


@option.with_options
def command(
    student: Student,
    data: option.Data,
    output: option.Output,
    run: option.Run,
    labels: option.Labels = None,
    num_samples: NumSamples = None,
    holdout: option.Holdout = defaults.HOLDOUT,
    fraction: Fraction = 0.1,
    balanced: Balanced = False,
    select: Annotated[str, option.method("select", "Chooses the samples.")] = "random",
    teacher: Teacher = None,
    adapt: Annotated[str, option.method("adapt", "Adapts the teacher; or none.")] = "none",
    alpha: Alpha = "auto",
    temperature: Temperature = 4.0,
    views: Views = 16,
    steps: Steps = 3000,
    batch_size: BatchSize = 64,
    lr: Lr = 0.05,
    settings: option.Set = None,
    resume: option.Resume = False,
    weights: option.Weights = None,
    no_pretrained: option.NoPretrained = False,
    teacher_weights: TeacherWeights = None,
    source: option.Source = None,
) -> None:
    """Train a student on a fraction of your labels, with a teacher's predictions or without."""
    with reporting(run.verbose, resumable=output):
        from ttmpd.students.run import run_student

        methods = choose_methods({"select": select, "adapt": adapt}, settings or [], None)
        chosen: dict[str, Any] = methods | {
            "fraction": fraction,
            "balanced": balanced,
            "alpha": _alpha(alpha),
            "temperature": temperature,
            "views": views,
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "seed": run.seed,
        }
        opened = _student(student, weights, no_pretrained, run.seed)
        guide = None if teacher is None else option.Model(teacher, teacher_weights, source=source).open()
        show_machine(run.device)
        result = run_student(
            opened,
            data,
            labels,
            output,
            teacher=guide,
            holdout=holdout,
            num_samples=num_samples,
            device=run.device,
            resume=resume,
            command=command_line(),
            **chosen,
        )
        _show(result)


def _alpha(text: str) -> float | str:
    """A number, or "auto"."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise InvalidValueError(f"alpha must be auto or from 0 to 1, but got {text!r}") from None


def _student(student: str, weights: Path | None, no_pretrained: bool, seed: int) -> "OpenedModel":
    """The model to train; random weights are drawn by ``seed``."""
    import torch

    from ttmpd.models.open import open_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_model(student, weights=weights, pretrained=not no_pretrained)


def _show(found: "StudentRun") -> None:
    """What the student learned from, and how good it is."""
    console, trained = display.out(), found.trained
    if trained.teacher is not None:
        console.print(f"Adaptation: {escape(trained.adapt_note)}")
    table = Table("", "", show_header=False)
    table.add_row("samples kept", f"{len(trained.selected)} of {found.n_samples}, by {trained.recipe.select.name}")
    table.add_row("weight of the teacher", f"{trained.alpha:g}")
    if trained.alpha:
        table.add_row("teacher passes per kept sample", str(trained.n_views))
    table.add_row("steps", str(trained.fit.steps))
    for name, accuracy in (("student", found.accuracy), ("teacher", found.teacher)):
        if accuracy is not None:
            table.add_row(f"{name}, accuracy on {accuracy.n} held-out samples", display.interval(accuracy))
    console.print(table)
    if found.accuracy is None:
        console.print("Accuracy: not measured, no samples were held out.")
    display.show_seconds(trained.seconds)
    console.print(f"Student: {escape(str(found.folder))} (model.safetensors, for --weights)", soft_wrap=True)
