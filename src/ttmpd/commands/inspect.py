"""What can be removed from a model."""

from pathlib import Path
from typing import Annotated

import typer

from ttmpd import display
from ttmpd.commands._options import (
    BatchSizeOption,
    DeviceOption,
    MaybeDataOption,
    ModelOption,
    PretrainedOption,
    SourceOption,
    VerboseOption,
    WeightsOption,
    open_chosen,
)
from ttmpd.commands._reporting import reporting


def command(
    model: ModelOption,
    data: MaybeDataOption = None,
    batch_size: BatchSizeOption = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    device: DeviceOption = "auto",
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Measure milliseconds on this device.")] = True,
    source: SourceOption = None,
    weights: WeightsOption = None,
    no_pretrained: PretrainedOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List what can be removed from a model, what cannot and why; nothing is changed."""
    with reporting(verbose):
        from ttmpd.inspection import inspect
        from ttmpd.stages import disk_guarded, write_json

        opened = open_chosen(model, source, weights, no_pretrained)
        found = inspect(opened, data, batch_size=batch_size, device=device, timed=timed)
        display.show_inspection(found)
        if json_file is not None:
            with disk_guarded(json_file):
                write_json(json_file, found.to_dict())
