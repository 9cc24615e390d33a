"""Options that several commands share: each is stated here once, with the section of ``--help`` that shows it.

A group is a dataclass of options. A command takes a group as one argument, :func:`with_options` puts the options of
the group in its place.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttmpd.errors import InvalidValueError
from ttmpd.method import names
from ttmpd.pipeline import defaults

if TYPE_CHECKING:
    from torch import nn

    from ttmpd.models.opened import OpenedModel

TARGET, MODEL, DATA, METHODS, RUN, OUTPUT = "Target", "Model", "Data", "Methods", "Run", "Output"
"""Sections of ``--help``."""

# ------------------------------------------------------------------------------------------------------------ options

Speedup = Annotated[
    float | None,
    typer.Option("--speedup", metavar="FACTOR", help="How many times as fast, e.g. 1.5.", rich_help_panel=TARGET),
]
Latency = Annotated[
    str | None,
    typer.Option(
        "--latency",
        metavar="12ms|0.6x",
        help="Milliseconds per batch, or a share of the latency that the model has now.",
        rich_help_panel=TARGET,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A folder of images, a .npz or .npy file; or text: .txt, .tsv, .csv, .json, .jsonl.",
        rich_help_panel=DATA,
    ),
]
DataOrRandom = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="PATH", help="Inputs to measure with; random values if left out.", rich_help_panel=DATA
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="A .csv with columns 'file' and 'label', a .npz with y, or text with a column 'label'.",
        rich_help_panel=DATA,
    ),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", min=2, metavar="N", help="Unlabelled samples to use.", rich_help_panel=DATA)
]
Holdout = Annotated[
    float,
    typer.Option(
        "--holdout",
        metavar="SHARE",
        help="Share of the samples that is only used to measure the result.",
        rich_help_panel=DATA,
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, metavar="N", help="Samples per batch.", rich_help_panel=RUN)
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=0, metavar="N", help="Distillation steps; by default the distiller's own.", rich_help_panel=RUN
    ),
]
Units = Annotated[
    str | None,
    typer.Option(
        "--units",
        metavar="KIND,...",
        help="Kinds of units that may be removed; by default those that are on by default.",
        rich_help_panel=METHODS,
    ),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help=f"What runs the models that are timed: {', '.join(names('runtimes'))}.",
        rich_help_panel=RUN,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="VERB.FIELD=VALUE",
        help="A setting of a method; may be repeated. `ttmpd methods NAME` lists them.",
        rich_help_panel=METHODS,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=RUN)]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result to this file, too.", rich_help_panel=OUTPUT),
]
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Folder for the artifact.", rich_help_panel=OUTPUT)
]
OutputIfWanted = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder for the artifact.", rich_help_panel=OUTPUT)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Log more, and show the traceback of an error.", rich_help_panel=RUN)
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.", rich_help_panel=RUN)]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME|NAME:KEY,KEY",
        help=f"What the model predicts, if not what is detected: {', '.join(names('tasks'))}; with the keys of those "
        "outputs that count, where there are several.",
        rich_help_panel=MODEL,
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="ID",
        help="The original model of an artifact that was made from your own code.",
        rich_help_panel=MODEL,
    ),
]

Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="A .safetensors file to load instead of the published weights.",
        rich_help_panel=MODEL,
    ),
]
NoPretrained = Annotated[
    bool, typer.Option("--no-pretrained", help="Random weights; nothing is downloaded.", rich_help_panel=MODEL)
]
MODEL_IDS = "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:/directory, FILE.py:factory, package.module:factory"


def method(verb: str, text: str) -> Any:
    """The option ``--VERB`` that names a method."""
    return typer.Option(f"--{verb}", metavar="NAME", help=text, rich_help_panel=METHODS)


# ------------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a command works on."""

    model: Annotated[
        str,
        typer.Option("--model", metavar="ID", help=f"{MODEL_IDS}, or an artifact folder.", rich_help_panel=MODEL),
    ]
    weights: Weights = None
    no_pretrained: NoPretrained = False
    source: Source = None
    task: Task = None
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            help="Tokens that are read of each text (default: 128, or as many as the model can).",
            rich_help_panel=MODEL,
        ),
    ] = None

    def open(self) -> "OpenedModel":
        """The model: that of an artifact, or one by its id; it carries the task that is named."""
        from ttmpd.artifact.read import is_artifact, open_artifact
        from ttmpd.models.open import open_model

        if not is_artifact(self.model):
            opened = open_model(self.model, weights=self.weights, pretrained=not self.no_pretrained)
        elif self.weights is not None or self.no_pretrained:
            raise InvalidValueError(
                f"an artifact must keep its own weights, but {self.model!r} was given others; leave out the option for "
                "weights"
            )
        else:
            opened = open_artifact(self.model, self.source)
        opened = opened.reading(self.max_length)
        if self.task is not None:
            carry_named(opened.module, self.task)
        return opened


def carry_named(module: "nn.Module", task: str) -> None:
    """Let a module carry the task NAME, or NAME:KEY,KEY. In place."""
    from ttmpd.method import method_of
    from ttmpd.models.tokens import carry_task

    name, _, keys = task.partition(":")
    parts = tuple(key.strip() for key in keys.split(",") if key.strip())
    carry_task(module, method_of("task", name).with_settings(parts=parts))


@dataclass(frozen=True, slots=True)
class Run:
    """On what a command runs, and what it says."""

    device: Device = defaults.DEVICE
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="The same seed makes the same choices.", rich_help_panel=RUN)
    ] = defaults.SEED
    verbose: Verbose = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose groups are spread out into their options, as typer reads them."""
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: plain.annotation for name, plain in signature.parameters.items() if is_dataclass(plain.annotation)
    }
    parameters = [
        parameter
        for name, plain in signature.parameters.items()
        for parameter in (_options_of(groups[name]) if name in groups else [plain])
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        built = {
            name: group(**{item.name: values.pop(item.name) for item in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__dict__["__wrapped__"]  # else typer reads the groups
    return run


def _options_of(group: Any) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
            annotation=item.type,
        )
        for item in fields(group)
    ]
