"""Options that several commands have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttmpd.errors import InvalidValueError

if TYPE_CHECKING:
    from ttmpd.models import OpenedModel

_MODEL = "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:/directory, FILE.py:factory, package.module:factory"
ModelOption = Annotated[str, typer.Option("--model", help=f"{_MODEL}, or an artifact folder.")]
DataOption = Annotated[str, typer.Option("--data", help="A folder of images, or a .npz or .npy file.")]
MaybeDataOption = Annotated[str | None, typer.Option("--data", help="Real inputs; random values when left out.")]
SourceOption = Annotated[
    str | None, typer.Option("--source", help="The original model of an artifact that came from your own code.")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="A .safetensors file to load instead of the published weights.")
]
PretrainedOption = Annotated[bool, typer.Option("--no-pretrained", help="Random weights: nothing is downloaded.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Say more, and show where an error came from.")]


def open_chosen(model: str, source: str | None, weights: Path | None, no_pretrained: bool) -> "OpenedModel":
    """The model that the options name: an artifact, or one by its id."""
    from ttmpd.checkpoint import is_artifact, open_artifact
    from ttmpd.models import open_model

    if not is_artifact(model):
        return open_model(model, weights=weights, pretrained=not no_pretrained)
    if weights is not None or no_pretrained:
        raise InvalidValueError(
            f"an artifact must keep its own weights, but {model!r} got --weights or --no-pretrained"
        )
    return open_artifact(model, source)
