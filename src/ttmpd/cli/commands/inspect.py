"""What can be removed from a model."""

from typing import Annotated

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import parts_of
from ttmpd.cli.commands._reporting import reporting, write_result


def command(
    model: option.Model,
    data: option.MaybeData = None,
    batch_size: option.BatchSize = 64,
    json_file: option.Json = None,
    device: option.Device = "auto",
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Measure milliseconds on this device.")] = True,
    units: option.Units = option.UNITS,
    max_length: option.MaxLength = None,
    task: option.Task = None,
    source: option.Source = None,
    weights: option.Weights = None,
    no_pretrained: option.Pretrained = False,
    verbose: option.Verbose = False,
) -> None:
    """List what can be removed from a model, what cannot and why; nothing is changed."""
    with reporting(verbose):
        from ttmpd.pipeline.inspect import inspect

        opened = option.open_chosen(model, source, weights, no_pretrained, max_length, task)
        found = inspect(opened, data, batch_size=batch_size, device=device, timed=timed, units=parts_of(units))
        display.show_inspection(found)
        write_result(json_file, found.to_dict())
