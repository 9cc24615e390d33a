"""``ttmpd evaluate``: accuracy with labels, agreement of two models without."""

from typing import TYPE_CHECKING, Annotated

from rich.markup import escape

from ttmpd.artifact import format
from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import reporting, write_result
from ttmpd.pipeline import defaults

if TYPE_CHECKING:
    from ttmpd.pipeline.evaluate import Evaluation

PLACE = 30
EXAMPLES = (
    "ttmpd evaluate --model fast/ --data photos/ --labels labels.csv --against timm:resnet50",
    "ttmpd evaluate --model fast/ --data photos/ --labels photos/     # a sub-folder per class",
    "ttmpd evaluate --model fast/ --data reviews.tsv --labels reviews.tsv",
    "ttmpd evaluate --model fast/ --data photos/ --against timm:resnet50     # agreement needs no labels",
)

Against = Annotated[
    str | None,
    option.option("--against", "Another model, or the folder of an artifact, to compare with.", option.MODEL,
                  metavar="ID"),
]  # fmt: skip


@option.with_options
def command(
    model: option.Model,
    data: option.Data,
    labels: option.Labels = None,
    against: Against = None,
    batch_size: option.BatchSize = defaults.BATCH_SIZE,
    json_file: option.Json = None,
    device: option.Device = defaults.DEVICE,
    verbose: option.Verbose = False,
) -> None:
    """Measure accuracy with labels, agreement with another model without; samples that a run used are left out."""
    with reporting(verbose):
        from ttmpd.artifact.read import open_any
        from ttmpd.pipeline.evaluate import evaluate

        opened = model.open()
        other = None if against is None else open_any(against, model.source).reading(model.max_length)
        if other is not None and model.task is not None:
            option.carry_named(other.module, model.task)
        result = evaluate(opened, data, labels, against=other, batch_size=batch_size, device=device)
        _show(result)
        write_result(json_file, result.to_dict())


def _show(found: "Evaluation") -> None:
    """Accuracy, calibration and agreement, with intervals."""
    console = display.out()
    columns = ["--model", *(["--against"] if found.against else [])]
    rows = [found.model, *([found.against] if found.against else [])]
    table = display.new_table("", *columns)
    if found.model.accuracy is not None:
        table.add_row("accuracy", *(display.interval(row.accuracy) for row in rows))
        table.add_row("calibration error", *(f"{row.calibration_error:.3f}" for row in rows))
    if found.each == "token" and found.model.loss is not None:
        table.add_row("nats per token", *(f"{row.loss:.4f}" for row in rows))
    if found.model.confidence is not None:
        table.add_row("mean confidence", *(format.percent(row.confidence or 0.0) for row in rows))
    console.print(table)
    if found.agreement is not None:
        console.print(f"Agreement between them: {display.interval(found.agreement)} (not accuracy)")
        if found.task != "classification":
            console.print(f"Task: {escape(found.task)}.")
    console.print(f"{found.n_samples} {found.each}s; intervals are 95 % Wilson.")
    if found.n_left_out:
        console.print(f"{found.n_left_out} samples left out: compression had used them.")
    if found.n_skipped:
        console.print(f"{found.n_skipped} samples skipped: they cannot be used.")
    for what, n in found.notes:
        console.print(f"{n} samples: {escape(what)}.")
