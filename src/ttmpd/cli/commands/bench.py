"""``ttmpd bench``: milliseconds of an artifact on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ttmpd.artifact import format
from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import reporting
from ttmpd.pipeline import defaults

if TYPE_CHECKING:
    from ttmpd.latency.device import Machine
    from ttmpd.pipeline.bench import BenchRow

PLACE = 40
EXAMPLES = (
    "ttmpd bench fast/",
    "ttmpd bench fast/ --batch-size 1 --batch-size 64 --data photos/",
)

BatchSizes = Annotated[
    list[int] | None,
    option.option("--batch-size", "Samples per batch; may be repeated. Without it: 1, and that of the run.", option.RUN,
                  min=1, metavar="N"),
]  # fmt: skip


@option.with_options
def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of an artifact.")],
    data: option.DataOrRandom = None,
    source: option.Source = None,
    runtime: option.Runtime = defaults.METHODS["runtime"],
    batch_sizes: BatchSizes = None,
    device: option.Device = defaults.DEVICE,
    verbose: option.Verbose = False,
) -> None:
    """Measure original and compressed model in turns on this machine."""
    with reporting(verbose):
        from ttmpd.latency.device import choose_device, machine
        from ttmpd.pipeline.bench import bench

        rows = bench(folder, source, batch_sizes=batch_sizes or (), samples=data, runtime=runtime, device=device)
        _show(rows, machine(choose_device(device)))


def _show(rows: "Sequence[BenchRow]", machine: "Machine") -> None:
    """One line per batch size."""
    display.show_machine(machine)
    table = display.new_table("batch", "original", "compressed", "speedup", right=("batch",))
    for row in rows:
        ratio = row.speedup
        faster = format.speedup(ratio.median_ms, ratio.low_ms, ratio.high_ms)
        table.add_row(str(row.batch_size), display.spread(row.original), display.spread(row.compressed), faster)
    display.out().print(table)
    display.out().print("Median and quartiles of interleaved rounds.")
