"""``ttmpd demo``: a first run that needs no file."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from ttmpd.artifact import format
from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import TARGET_MISSED, reporting

if TYPE_CHECKING:
    from ttmpd.demo.run import DemoOutcome

PLACE = 100
EXAMPLES = ("ttmpd demo", "ttmpd inspect --model ttmpd.demo:demo_model")


@option.with_options
def command(output: option.Output = Path("artifacts/demo"), verbose: option.Verbose = False) -> None:
    """Compress a small model of handwritten digits: no download, no GPU, a minute or two on 2 cores."""
    with reporting(verbose):
        from ttmpd.demo.run import run_demo

        outcome = run_demo(output)
        _show(outcome)
        if not outcome.is_fast_enough:
            display.show_error("Target missed", "this machine is busy, or gains less from removed blocks")
            raise typer.Exit(TARGET_MISSED)


def _show(found: "DemoOutcome") -> None:
    """The demo's table: original against compressed."""
    console, report = display.out(), found.result.report
    shifted, clean = found.shifted, found.clean
    assert shifted.against is not None
    assert clean.against is not None
    latency, agreement, adaptation = report.latency, report.agreement, report.adaptation
    assert latency is not None and agreement is not None and adaptation is not None
    display.show_machine(report.machine)
    console.print(
        f"Data: digits from another scanner ({escape(found.corruption)}); the original was trained on clean ones."
    )
    console.print(f"Adaptation: {escape(adaptation.note)}")
    table = display.new_table("", "original", "compressed")
    name = f"accuracy, {shifted.n_samples} held-out shifted digits"
    table.add_row(name, display.interval(shifted.against.accuracy), display.interval(shifted.model.accuracy))
    name = f"accuracy, {clean.n_samples} held-out clean digits"
    table.add_row(name, display.interval(clean.against.accuracy), display.interval(clean.model.accuracy))
    table.add_row("agreement with the original", "", display.interval(shifted.agreement))
    table.add_row("agreement with the adapted model", "", display.interval(agreement))
    row = f"latency per batch of {latency.batch_size}"
    table.add_row(row, display.spread(latency.original), display.spread(latency.compressed))
    speedup = latency.speedup
    table.add_row("speedup", "", format.speedup(speedup.median, speedup.low, speedup.high))
    table.add_row("parameters", format.count(report.model.parameters), format.count(report.student.parameters))
    table.add_row("multiply-accumulates (MACs)", format.count(report.model.macs), format.count(report.student.macs))
    console.print(table)
    display.show_seconds(report.seconds)
    console.print(f"Artifact: {escape(str(found.folder))} (open report.html there)", soft_wrap=True)
    console.print(
        "Next: `ttmpd inspect --model ID` for a model of yours, then `ttmpd compress --help`, which shows examples."
    )
