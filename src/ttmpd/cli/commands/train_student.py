"""A student from a part of the labels."""

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

if TYPE_CHECKING:
    from ttmpd.models.opened import OpenedModel
    from ttmpd.students.run import StudentRun


def command(
    student: Annotated[str, typer.Option("--student", help="A model id, as --model elsewhere; no artifact.")],
    data: option.Data,
    output: Annotated[Path, typer.Option("--output", help="Folder for the student.")],
    labels: option.Labels = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="A model id or an artifact folder.")] = None,
    fraction: Annotated[float, typer.Option("--fraction", help="Share of the samples that is kept.")] = 0.1,
    select: Annotated[str, typer.Option("--select", help="A selector: which samples are kept.")] = "random",
    balanced: Annotated[bool, typer.Option("--balanced", help="As evenly from all classes as they allow.")] = False,
    adapt: Annotated[str, typer.Option("--adapt", help="An adapter of the teacher, or none.")] = "none",
    alpha: Annotated[str, typer.Option("--alpha", help="Weight of the teacher, 0 to 1; auto: by fraction.")] = "auto",
    temperature: Annotated[float, typer.Option("--temperature", help="Of the soft labels.")] = 4.0,
    views: Annotated[int, typer.Option("--views", min=1, help="Fixed views per sample; 1 mirrors nothing.")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps, whatever the fraction.")] = 3000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Samples per step.")] = 64,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of SGD.")] = 0.05,
    holdout: Annotated[float, typer.Option("--holdout", help="Share that is only measured on.")] = 0.15,
    num_samples: Annotated[int | None, typer.Option("--num-samples", min=2, help="At most so many of DATA.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="VERB.FIELD=VALUE: select or adapt.")] = None,
    seed: option.Seed = 0,
    device: option.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    weights: option.Weights = None,
    no_pretrained: option.Pretrained = False,
    teacher_weights: Annotated[Path | None, typer.Option("--teacher-weights", help="The same for the teacher.")] = None,
    source: option.Source = None,
    verbose: option.Verbose = False,
) -> None:
    """Train a student on few of your labels and a teacher's answers; --no-pretrained makes it start from nothing."""
    with reporting(verbose, resumable=output):
        from ttmpd.students.run import run_student

        methods = choose_methods({"select": select, "adapt": adapt}, settings or [], None)
        chosen: dict[str, Any] = methods | {
            "fraction": fraction, "balanced": balanced, "alpha": _alpha(alpha), "temperature": temperature,
            "views": views, "steps": steps, "batch": batch_size, "lr": lr, "seed": seed,
        }  # fmt: skip
        opened = _student(student, weights, no_pretrained, seed)
        guide = None if teacher is None else option.open_chosen(teacher, source, teacher_weights, False)
        show_machine(device)
        found = run_student(
            opened, data, labels, output, teacher=guide, holdout=holdout, num_samples=num_samples, device=device,
            resume=resume, command=command_line(), **chosen,
        )  # fmt: skip
        _show(found)


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
            table.add_row(f"{name}, accuracy on {accuracy.n_samples} held-out samples", display.percent(accuracy))
    console.print(table)
    if found.accuracy is None:
        console.print("Accuracy: not measured, no samples were held out.")
    display.show_seconds(trained.seconds)
    console.print(f"Student: {escape(str(found.folder))} (model.safetensors, for --weights)", soft_wrap=True)
