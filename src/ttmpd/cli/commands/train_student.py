"""``ttmpd train-student``: a student from a part of the labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
EXAMPLES = (
    "ttmpd train-student --student timm:resnet18 --no-pretrained --data photos/ --labels labels.csv --output student/",
    "ttmpd train-student --student net.py:factory --teacher big.py:factory --data data.npz --output student/",
)


@dataclass(frozen=True, slots=True)
class Networks:
    """The network to train, and the one to learn from."""

    student: Annotated[
        str, option.option("--student", f"The model to train: {option.MODEL_IDS}.", option.MODEL, metavar="ID")
    ]
    weights: option.Weights = None
    no_pretrained: option.NoPretrained = False
    teacher: Annotated[
        str | None,
        option.option(
            "--teacher", "A model id or the folder of an artifact to learn from.", option.MODEL, metavar="ID"
        ),
    ] = None
    teacher_weights: Annotated[
        Path | None,
        option.option("--teacher-weights", "A .safetensors file for the teacher.", option.MODEL, metavar="FILE"),
    ] = None
    source: option.Source = None

    def open(self, seed: int) -> "tuple[OpenedModel, OpenedModel | None]":
        """Student and teacher; random weights of the student are drawn by ``seed``."""
        import torch

        from ttmpd.models.open import open_model

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            student = open_model(self.student, weights=self.weights, pretrained=not self.no_pretrained)
        if self.teacher is None:
            return student, None
        return student, option.Model(self.teacher, self.teacher_weights, source=self.source).open()


@dataclass(frozen=True, slots=True)
class Labelled:
    """The labelled samples, and which of them are trained on."""

    data: option.Data
    labels: option.Labels = None
    num_samples: Annotated[
        int | None,
        option.option(
            "--num-samples", "Use at most so many samples; without it, all.", option.DATA, min=2, metavar="N"
        ),
    ] = None
    holdout: option.Holdout = defaults.HOLDOUT
    fraction: Annotated[
        float, option.option("--fraction", "Share of the samples that is trained on.", option.DATA, metavar="SHARE")
    ] = defaults.STUDENT_FRACTION
    balanced: Annotated[
        bool, option.flag("--balanced", "The same number of each class, as far as there are.", option.DATA)
    ] = False


@dataclass(frozen=True, slots=True)
class Training:
    """How the student learns."""

    select: Annotated[str, option.method("select", "Chooses the samples.")] = "random"
    adapt: Annotated[str, option.method("adapt", "Adapts the teacher to the samples; or none.")] = "none"
    alpha: Annotated[
        str,
        option.option("--alpha", "Weight of the teacher beside the labels; auto: by the fraction.", option.METHODS,
                      metavar="0..1|auto"),
    ] = defaults.STUDENT_ALPHA  # fmt: skip
    temperature: Annotated[
        float, option.option("--temperature", "Of the teacher's soft labels.", option.METHODS, metavar="T")
    ] = defaults.STUDENT_TEMPERATURE
    views: Annotated[
        int,
        option.option("--views", "Fixed augmented views per sample; 1 for none.", option.METHODS, min=1, metavar="N"),
    ] = defaults.STUDENT_VIEWS
    method_settings: option.Set = None
    steps: Annotated[
        int, option.option("--steps", "Training steps, whatever the fraction.", option.RUN, min=1, metavar="N")
    ] = defaults.STUDENT_STEPS
    batch_size: Annotated[int, option.option("--batch-size", "Samples per step.", option.RUN, min=2, metavar="N")] = (
        defaults.STUDENT_BATCH_SIZE
    )
    lr: Annotated[float, option.option("--lr", "Peak learning rate of SGD.", option.RUN, metavar="LR")] = (
        defaults.STUDENT_LR
    )

    def settings(self) -> dict[str, Any]:
        """As fields of :class:`ttmpd.students.recipe.Recipe`."""
        plain = ("temperature", "views", "steps", "batch_size", "lr")
        methods = choose_methods({"select": self.select, "adapt": self.adapt}, self.method_settings or [], None)
        return methods | {"alpha": _alpha(self.alpha)} | {name: getattr(self, name) for name in plain}


@option.with_options
def command(
    networks: Networks,
    samples: Labelled,
    output: option.Output,
    training: Training,
    run: option.Run,
    resume: option.Resume = False,
) -> None:
    """Train a student on a share of your labels, with a teacher's predictions or without."""
    with reporting(run.verbose, resumable=output):
        from ttmpd.students.run import run_student

        settings: dict[str, Any] = training.settings() | run.settings()
        settings |= {name: getattr(samples, name) for name in ("num_samples", "holdout", "fraction", "balanced")}
        student, teacher = networks.open(run.seed)
        show_machine(run.device)
        settings |= {"teacher": teacher, "resume": resume, "command": command_line()}
        _show(run_student(student, samples.data, samples.labels, output, **settings))


def _alpha(text: str) -> float | str:
    """A number, or "auto"."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise InvalidValueError(f"alpha must be auto or from 0 to 1, but got {text!r}") from None


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
    console.print(f"Student: {escape(str(found.folder))} (an artifact: evaluate it, or ttmpd.load)", soft_wrap=True)
