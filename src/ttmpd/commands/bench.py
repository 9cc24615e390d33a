"""Milliseconds of an artifact on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from ttmpd import display
from ttmpd.commands import _options as option
from ttmpd.commands._reporting import reporting


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact folder.")],
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", help="As often as wanted.")] = None,
    data: option.MaybeData = None,
    device: option.Device = "auto",
    source: option.Source = None,
    verbose: option.Verbose = False,
) -> None:
    """Time original and compressed, interleaved, on this machine."""
    with reporting(verbose):
        from ttmpd.evaluation import bench
        from ttmpd.settings import choose_device
        from ttmpd.timing import machine

        rows = bench(folder, source, batch_sizes=batch_size or (), data=data, device=device)
        display.show_bench(rows, machine(choose_device(device)))
