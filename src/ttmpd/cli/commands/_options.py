"""Options that several commands share: each is stated here once, with the section of ``--help`` that shows it.

A group is a dataclass of options. A command takes a group as one argument, :func:`with_options` puts the options of
the group in its place, and ``settings()`` of a group says what they mean in Python.
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

SECTIONS = MODEL, DATA, TARGET, OUTPUT, SERVER, METHODS, RUN = (
    "Model", "Data", "Target", "Output", "Server", "Methods", "Run",
)  # fmt: skip
"""Of ``--help``, in this order."""
MODEL_IDS = "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:DIRECTORY, FILE.py:factory, package.module:factory"


def option(name: str, text: str, section: str, **more: Any) -> Any:
    """An option with its help text in a section of ``--help``."""
    return typer.Option(name, help=text, rich_help_panel=section, **more)


def method(verb: str, text: str) -> Any:
    """The option ``--VERB`` that names a method."""
    return option(f"--{verb}", text, METHODS, metavar="NAME")


def flag(name: str, text: str, section: str) -> Any:
    """An option without a value."""
    return option(name, text, section, metavar="")


def _in_a_folder(file: Path | None) -> Path | None:
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"must lie in a folder that exists, but got {str(file)!r}; make the folder first")
    return file


# ------------------------------------------------------------------------------------------------------------ options

Data = Annotated[
    str,
    option(
        "--data",
        "A folder of images, or an .npy or .npz file; text: .txt, .tsv, .csv, .jsonl, .json, or a folder of .txt.",
        DATA,
        metavar="PATH",
    ),
]
DataOrRandom = Annotated[
    str | None, option("--data", "Samples to measure with; without it, random values.", DATA, metavar="PATH")
]
Labels = Annotated[
    Path | None,
    option(
        "--labels",
        "A .csv with the columns 'file' and 'label', an .npz with 'y', a table of texts with a column 'label', or the "
        "folder of --data again where it has a sub-folder per class.",
        DATA,
        metavar="PATH",
    ),
]
NumSamples = Annotated[int, option("--num-samples", "How many samples to use, unlabelled.", DATA, min=2, metavar="N")]
Holdout = Annotated[
    float,
    option("--holdout", "Share of the samples that nothing learns from: the result is measured on it.", DATA,
           metavar="SHARE"),
]  # fmt: skip
BatchSize = Annotated[
    int, option("--batch-size", "Samples per batch; latency is that of one batch.", RUN, min=1, metavar="N")
]
Steps = Annotated[
    int | None,
    option("--steps", "Training steps; without it, as many as the distiller chooses.", RUN, min=0, metavar="N"),
]
Units = Annotated[
    str | None,
    option(
        "--units",
        f"Kinds of units that may be removed: {', '.join(names('units'))}; without it, those that are on by default.",
        METHODS,
        metavar="KIND,...",
    ),
]
Runtime = Annotated[
    str,
    option("--runtime", f"What runs the models that are timed: {', '.join(names('runtimes'))}.", RUN, metavar="NAME"),
]
Set = Annotated[
    list[str] | None,
    option(
        "--set",
        "A setting of a method, e.g. distill.steps=200; may be repeated. `ttmpd methods NAME` lists them.",
        METHODS,
        metavar="VERB.FIELD=VALUE",
    ),
]
Resume = Annotated[bool, flag("--resume", "Continue an interrupted run in the same --output.", RUN)]
Json = Annotated[
    Path | None,
    option("--json", "Also write the result to this file.", OUTPUT, metavar="FILE", callback=_in_a_folder),
]
Output = Annotated[
    Path, option("--output", "Folder for the artifact, new or of an earlier run.", OUTPUT, metavar="DIR")
]
OutputIfWanted = Annotated[Path | None, option("--output", "Folder for the artifact.", OUTPUT, metavar="DIR")]
Verbose = Annotated[bool, flag("--verbose", "Log more, and show the traceback of an error.", RUN)]
Device = Annotated[
    str, option("--device", "cpu, cuda or mps; auto takes a GPU where there is one.", RUN, metavar="NAME")
]
Seed = Annotated[int, option("--seed", "The same seed makes the same choices.", RUN, metavar="N")]
Task = Annotated[
    str | None,
    option(
        "--task",
        f"What the model predicts, where it is not detected: {', '.join(names('tasks'))}; of several outputs, the keys "
        "of those that count.",
        MODEL,
        metavar="NAME[:KEY,...]",
    ),
]
Source = Annotated[
    str | None,
    option("--source", "The original model of an artifact that was made from your own code.", MODEL, metavar="ID"),
]
Weights = Annotated[
    Path | None,
    option("--weights", "A .safetensors file to load instead of the published weights.", MODEL, metavar="FILE"),
]
NoPretrained = Annotated[bool, flag("--no-pretrained", "Random weights; nothing is downloaded.", MODEL)]

# ------------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a command works on."""

    model: Annotated[str, option("--model", f"{MODEL_IDS}, or the folder of an artifact.", MODEL, metavar="ID")]
    weights: Weights = None
    no_pretrained: NoPretrained = False
    source: Source = None
    task: Task = None
    max_length: Annotated[
        int | None,
        option("--max-length", "Tokens to read of each text; without it 128, or fewer where the model takes fewer.",
               MODEL, min=1, metavar="N"),
    ] = None  # fmt: skip

    def open(self) -> "OpenedModel":
        """The model: that of an artifact, or one by its id; it carries the task that is named."""
        from ttmpd.artifact.read import is_artifact, open_artifact
        from ttmpd.models.open import open_model

        if not is_artifact(self.model):
            opened = open_model(self.model, weights=self.weights, pretrained=not self.no_pretrained)
        elif self.weights is not None or self.no_pretrained:
            raise InvalidValueError(
                f"an artifact must keep its own weights, but {self.model!r} was given others; leave out --weights and "
                "--no-pretrained"
            )
        else:
            opened = open_artifact(self.model, self.source)
        opened = opened.reading(self.max_length)
        if self.task is not None:
            carry_named(opened.module, self.task)
        return opened


def carry_named(module: "nn.Module", task: str) -> None:
    """Let a module carry the task NAME, or NAME:KEY,KEY; that of an artifact has to be the same. In place."""
    from ttmpd.method import method_of
    from ttmpd.models.tokens import carried_task, carry_task
    from ttmpd.training.task import check_agrees

    name, _, keys = task.partition(":")
    parts = tuple(key.strip() for key in keys.split(",") if key.strip())
    chosen: Any = method_of("task", name).with_settings(parts=parts)
    check_agrees(chosen, carried_task(module))
    carry_task(module, chosen)


@dataclass(frozen=True, slots=True)
class Target:
    """How fast the result shall be: exactly one of the options."""

    speedup: Annotated[
        float | None, option("--speedup", "How many times as fast, e.g. 1.5.", TARGET, metavar="FACTOR")
    ] = None
    latency: Annotated[
        str | None,
        option("--latency", "Milliseconds per batch, or a share of what the model takes now.", TARGET,
               metavar="12ms|0.6x"),
    ] = None  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """The option that was given, as an argument of ``compress`` and the like."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) != 1:
            options = [f"--{name}" for name in values]
            got = " and ".join(f"--{name}" for name in given) or "none"
            raise typer.BadParameter(
                f"give exactly one of {', '.join(options[:-1])} and {options[-1]}, but got {got}; e.g. --speedup 1.5"
            )
        return given


@dataclass(frozen=True, slots=True)
class Calibration:
    """The unlabelled samples that a command learns from."""

    data: Data
    num_samples: NumSamples = defaults.NUM_SAMPLES
    holdout: Holdout = defaults.HOLDOUT
    batch_size: BatchSize = defaults.BATCH_SIZE

    def settings(self) -> dict[str, Any]:
        """All but the samples themselves, as fields of :class:`ttmpd.Settings`."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "data"}


@dataclass(frozen=True, slots=True)
class Run:
    """On what a command runs, and what it says."""

    device: Device = defaults.DEVICE
    seed: Seed = defaults.SEED
    verbose: Verbose = False

    def settings(self) -> dict[str, Any]:
        """As fields of :class:`ttmpd.Settings`."""
        return {"device": self.device, "seed": self.seed}


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

    parameters.sort(key=_section)
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__dict__["__wrapped__"]  # else typer reads the groups
    return run


def _section(parameter: inspect.Parameter) -> int:
    """Place of the section that shows a parameter; arguments come first."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return SECTIONS.index(panel) if panel in SECTIONS else -1


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
