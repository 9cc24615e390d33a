"""A teacher moved to the data, with nothing removed."""

from pathlib import Path
from typing import Annotated

import typer

from ttmpd import display
from ttmpd.commands._options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    ModelOption,
    PretrainedOption,
    SourceOption,
    VerboseOption,
    WeightsOption,
    open_chosen,
)
from ttmpd.commands._parsing import choose_methods
from ttmpd.commands._reporting import reporting, show_machine


def command(
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", help="Folder for the artifact.")],
    adapt: Annotated[str, typer.Option("--adapt", help="An adapter.")] = "norm",
    settings: Annotated[list[str] | None, typer.Option("--set", help="adapt.FIELD=VALUE, as often as wanted.")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=2, help="Unlabelled samples to use.")] = 500,
    holdout: Annotated[float, typer.Option("--holdout", help="Share of them that is held out.")] = 0.15,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    source: SourceOption = None,
    weights: WeightsOption = None,
    no_pretrained: PretrainedOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Adapt a model to unlabelled samples and keep all of it; `compress` and `evaluate` take the artifact."""
    with reporting(verbose):
        from ttmpd.adapting import adapt_to

        method = choose_methods({"adapt": adapt}, settings or [], None)
        opened = open_chosen(model, source, weights, no_pretrained)
        show_machine(device)
        found = adapt_to(
            opened, data, output=output, num_samples=num_samples, holdout=holdout, batch_size=batch_size,
            device=device, seed=seed, **method,
        )  # fmt: skip
        display.show_adapted(found, output)
