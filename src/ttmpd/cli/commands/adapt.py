"""A teacher moved to the data, with nothing removed."""

from pathlib import Path
from typing import Annotated

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import choose_methods
from ttmpd.cli.commands._reporting import reporting, show_machine


def command(
    model: option.Model,
    data: option.Data,
    output: Annotated[Path, typer.Option("--output", help="Folder for the artifact.")],
    adapt: Annotated[str, typer.Option("--adapt", help="An adapter.")] = "norm",
    settings: Annotated[list[str] | None, typer.Option("--set", help="adapt.FIELD=VALUE, as often as wanted.")] = None,
    num_samples: option.NumSamples = 500,
    holdout: option.Holdout = 0.15,
    batch_size: option.BatchSize = 64,
    device: option.Device = "auto",
    seed: option.Seed = 0,
    max_length: option.MaxLength = None,
    task: option.Task = None,
    source: option.Source = None,
    weights: option.Weights = None,
    no_pretrained: option.Pretrained = False,
    verbose: option.Verbose = False,
) -> None:
    """Adapt a model to unlabelled samples and keep all of it; `compress` and `evaluate` take the artifact."""
    with reporting(verbose):
        from ttmpd.pipeline.adapt import adapt_to

        method = choose_methods({"adapt": adapt}, settings or [], None)
        opened = option.open_chosen(model, source, weights, no_pretrained, max_length, task)
        show_machine(device)
        found = adapt_to(
            opened, data, output=output, num_samples=num_samples, holdout=holdout, batch_size=batch_size,
            device=device, seed=seed, **method,
        )  # fmt: skip
        display.show_adapted(found, output)
