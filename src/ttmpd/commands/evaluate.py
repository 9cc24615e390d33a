"""Accuracy with labels, agreement without."""

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
from ttmpd.commands._reporting import reporting


def command(
    model: ModelOption,
    data: DataOption,
    labels: Annotated[Path | None, typer.Option("--labels", help="A .npz with y, or a .csv of file and label.")] = None,
    against: Annotated[str | None, typer.Option("--against", help="Another model or artifact folder.")] = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    source: SourceOption = None,
    weights: WeightsOption = None,
    no_pretrained: PretrainedOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Accuracy and calibration with labels, agreement without; samples used for compression are left out."""
    with reporting(verbose):
        from ttmpd.evaluation import evaluate, open_any
        from ttmpd.stages import disk_guarded, write_json

        opened = open_chosen(model, source, weights, no_pretrained)
        other = None if against is None else open_any(against, source)
        found = evaluate(opened, data, labels, against=other, batch_size=batch_size, device=device)
        display.show_evaluation(found)
        if json_file is not None:
            with disk_guarded(json_file):
                write_json(json_file, found.to_dict())
