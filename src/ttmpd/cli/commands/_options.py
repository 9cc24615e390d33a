"""Options that several commands have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttmpd.errors import InvalidValueError
from ttmpd.method import names

if TYPE_CHECKING:
    from torch import nn

    from ttmpd.models.opened import OpenedModel

_MODEL = "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:/directory, FILE.py:factory, package.module:factory"
Model = Annotated[str, typer.Option("--model", help=f"{_MODEL}, or an artifact folder.")]
Data = Annotated[
    str,
    typer.Option("--data", help="A folder of images, a .npz or .npy file; or text: .txt, .tsv, .csv, .json, .jsonl."),
]
MaybeData = Annotated[str | None, typer.Option("--data", help="Real inputs; random values when left out.")]
Source = Annotated[
    str | None, typer.Option("--source", help="The original model of an artifact that came from your own code.")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="A .safetensors file to load instead of the published weights.")
]
Pretrained = Annotated[bool, typer.Option("--no-pretrained", help="Random weights: nothing is downloaded.")]
Units = Annotated[str, typer.Option("--units", help="Some of block, head, neuron, channel.")]
UNITS = "block,head,neuron,channel"
"""The default of the settings, spelled here so that ``--help`` needs no torch."""
NumSamples = Annotated[int, typer.Option("--num-samples", min=2, help="Unlabelled samples to use.")]
Holdout = Annotated[float, typer.Option("--holdout", help="Share of them that is held out.")]
Seed = Annotated[int, typer.Option("--seed")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")]
Labels = Annotated[
    Path | None, typer.Option("--labels", help="A .npz with y, a .csv of file and label, or text with a column label.")
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        help=f"What the model predicts [default: detected]: {', '.join(names('tasks'))}; of several outputs "
        "NAME:KEY,KEY.",
    ),
]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", help="Tokens of a text that are read [default: 128, or what it can].")
]
Speedup = Annotated[float | None, typer.Option("--speedup", help="Times faster, e.g. 2.0.")]
Latency = Annotated[str | None, typer.Option("--latency", help='"12ms" per batch, or "0.5x" of now.')]
Steps = Annotated[int | None, typer.Option("--steps", min=0, help="Distillation steps [default: 400].")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
Runtime = Annotated[
    str, typer.Option("--runtime", help=f"Runs the models that are timed: {', '.join(names('runtimes'))}.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say more, and show where an error came from.")]


def open_chosen(
    model: str,
    source: str | None,
    weights: Path | None,
    no_pretrained: bool,
    max_length: int | None = None,
    task: str | None = None,
) -> "OpenedModel":
    """The model that the options name: an artifact, or one by its id; it carries the task that is named."""
    opened = _opened(model, source, weights, no_pretrained, max_length)
    if task is not None:
        carry_named(opened.module, task)
    return opened


def carry_named(module: "nn.Module", task: str) -> None:
    """Let a module carry the task NAME, or NAME:KEY,KEY. In place."""
    from ttmpd.method import method_of
    from ttmpd.models.tokens import carry_task

    name, _, keys = task.partition(":")
    parts = tuple(key.strip() for key in keys.split(",") if key.strip())
    carry_task(module, method_of("task", name).with_settings(parts=parts))


def _opened(
    model: str, source: str | None, weights: Path | None, no_pretrained: bool, max_length: int | None
) -> "OpenedModel":
    from ttmpd.artifact.read import is_artifact, open_artifact
    from ttmpd.models.open import open_model

    if not is_artifact(model):
        return open_model(model, weights=weights, pretrained=not no_pretrained).reading(max_length)
    if weights is not None or no_pretrained:
        raise InvalidValueError(
            f"an artifact must keep its own weights, but {model!r} was given others; leave out the option for weights"
        )
    return open_artifact(model, source).reading(max_length)
