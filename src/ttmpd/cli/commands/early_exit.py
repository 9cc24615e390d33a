"""Exits for samples that are sure early."""

from pathlib import Path
from typing import Annotated

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import choose_methods
from ttmpd.cli.commands._reporting import TARGET_MISSED, command_line, reporting, show_machine


def command(
    model: option.Model,
    data: option.Data,
    output: Annotated[Path, typer.Option("--output", help="Folder for the artifact.")],
    speedup: option.Speedup = None,
    latency: option.Latency = None,
    labels: option.Labels = None,
    method: Annotated[str, typer.Option("--method", help="How exits are made.")] = "right_tool",
    settings: Annotated[list[str] | None, typer.Option("--set", help="early_exit.FIELD=VALUE, any number.")] = None,
    num_samples: option.NumSamples = 1000,
    holdout: option.Holdout = 0.15,
    batch_size: option.BatchSize = 1,
    device: option.Device = "auto",
    seed: option.Seed = 0,
    max_length: option.MaxLength = None,
    task: option.Task = None,
    source: option.Source = None,
    weights: option.Weights = None,
    no_pretrained: option.Pretrained = False,
    verbose: option.Verbose = False,
) -> None:
    """Let sure samples leave a model early, for a mean latency; labels may be learned from, none are needed."""
    with reporting(verbose):
        from ttmpd.pipeline.early_exits import add_early_exits
        from ttmpd.pipeline.settings import Target

        Target.of(speedup, latency)  # before anything is opened
        tool = choose_methods({"early_exit": method}, settings or [], None)["early_exit"]
        opened = option.open_chosen(model, source, weights, no_pretrained, max_length, task)
        show_machine(device)
        found = add_early_exits(
            opened, data, speedup=speedup, latency=latency, labels=labels, method=tool, output=output,
            command=command_line(), num_samples=num_samples, holdout=holdout, batch_size=batch_size, device=device,
            seed=seed,
        )  # fmt: skip
        display.show_exits(found, output)
        if not found.met:
            best = found.facts["latency"]["compressed"]["median_ms"]
            display.show_error("Target missed", f"the mean that was measured is {best:.4g} ms; the artifact is kept")
            raise typer.Exit(TARGET_MISSED)
