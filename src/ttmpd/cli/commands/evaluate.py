"""Accuracy with labels, agreement without."""

from typing import Annotated

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import reporting, write_result


def command(
    model: option.Model,
    data: option.Data,
    labels: option.Labels = None,
    against: Annotated[str | None, typer.Option("--against", help="Another model or artifact folder.")] = None,
    batch_size: option.BatchSize = 64,
    device: option.Device = "auto",
    json_file: option.Json = None,
    max_length: option.MaxLength = None,
    task: option.Task = None,
    source: option.Source = None,
    weights: option.Weights = None,
    no_pretrained: option.Pretrained = False,
    verbose: option.Verbose = False,
) -> None:
    """Accuracy and calibration with labels, agreement without; samples used for compression are left out."""
    with reporting(verbose):
        from ttmpd.artifact.read import open_any
        from ttmpd.pipeline.evaluate import evaluate

        opened = option.open_chosen(model, source, weights, no_pretrained, max_length, task)
        other = None if against is None else open_any(against, source).reading(max_length)
        if other is not None and task is not None:
            option.carry_named(other.module, task)
        found = evaluate(opened, data, labels, against=other, batch_size=batch_size, device=device)
        display.show_evaluation(found)
        write_result(json_file, found.to_dict())
