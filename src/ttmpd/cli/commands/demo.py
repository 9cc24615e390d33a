"""A first run, without any file."""

from pathlib import Path
from typing import Annotated

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import TARGET_MISSED, reporting


def command(
    output: Annotated[Path, typer.Option("--output", help="Folder for the artifact.")] = Path("artifacts/demo"),
    verbose: option.Verbose = False,
) -> None:
    """The whole thing on handwritten digits: no download, no GPU, under 90 seconds on 2 cores."""
    with reporting(verbose):
        from ttmpd.demo.run import run_demo

        outcome = run_demo(output)
        display.show_demo(outcome)
        if not outcome.is_fast_enough:
            display.show_error("Target missed", "this machine is busy, or gains less from removed blocks")
            raise typer.Exit(TARGET_MISSED)
