"""Milliseconds of an artifact on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import reporting


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact folder.")],
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", help="As often as wanted.")] = None,
    data: option.MaybeData = None,
    device: option.Device = "auto",
    runtime: option.Runtime = "eager",
    source: option.Source = None,
    verbose: option.Verbose = False,
) -> None:
    """Time original and compressed, interleaved, on this machine."""
    with reporting(verbose):
        from ttmpd.latency.device import choose_device, machine
        from ttmpd.pipeline.bench import bench

        rows = bench(folder, source, batch_sizes=batch_size or (), data=data, runtime=runtime, device=device)
        display.show_bench(rows, machine(choose_device(device)))
