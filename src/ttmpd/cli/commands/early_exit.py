"""``ttmpd early-exit``: exits that let a model stop early where its class is clear."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ttmpd.artifact import format
from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import choose_methods
from ttmpd.cli.commands._reporting import TARGET_MISSED, command_line, reporting, show_machine
from ttmpd.pipeline import defaults

if TYPE_CHECKING:
    from ttmpd.artifact.write import Result

PLACE = 60
EXAMPLES = (
    "ttmpd early-exit --model fast/ --data photos/ --speedup 1.5 --output sooner/",
    "ttmpd early-exit --model hf:ORG/NAME --data reviews.tsv --labels reviews.tsv --latency 0.6x --output sooner/",
)


@dataclass(frozen=True, slots=True)
class Calibration(option.Calibration):
    """The samples; exits need more of them, and samples leave one by one."""

    num_samples: option.NumSamples = defaults.EXIT_NUM_SAMPLES
    batch_size: option.BatchSize = defaults.EXIT_BATCH_SIZE


@option.with_options
def command(
    model: option.Model,
    samples: Calibration,
    target: option.Target,
    output: option.Output,
    run: option.Run,
    labels: option.Labels = None,
    method: Annotated[str, option.method("method", "How exits are made.")] = defaults.METHODS["early_exit"],
    method_settings: option.Set = None,
) -> None:
    """Add exits behind some blocks: a sample whose class is clear early skips the rest."""
    asked = target.settings()
    with reporting(run.verbose):
        from ttmpd.pipeline.early_exits import add_early_exits
        from ttmpd.pipeline.settings import Target

        Target.of(**asked)  # before anything is opened
        settings = samples.settings() | run.settings() | asked
        exits = choose_methods({"early_exit": method}, method_settings or [], None)["early_exit"]
        opened = model.open()
        show_machine(run.device)
        more = {"labels": labels, "method": exits, "output": output, "command": command_line()}
        result = add_early_exits(opened, samples.data, **settings, **more)
        _show(result, output)
        if not result.met:
            display.show_error("Target missed", f"{_measured(result)}; the artifact is kept")
            raise typer.Exit(TARGET_MISSED)


def _measured(result: "Result") -> str:
    latency = result.report.latency
    return f"the mean that was measured is {format.milliseconds(latency.compressed.median_ms if latency else None)} ms"


def _show(result: "Result", folder: object) -> None:
    """Where samples leave, how fast that is, how far the predictions are the model's, and where the artifact lies."""
    console, report = display.out(), result.report
    exits = report.exits
    assert exits is not None
    numbers = ("samples", "leaves from", "ms", "agreement", "temperature", "calibration error")
    table = display.new_table("exit behind", *numbers, right=numbers, title="Exits")
    for exit in exits.exits:
        errors = (exit.calibration_error_before, exit.calibration_error)
        table.add_row(
            escape(exit.path),
            format.percent(exit.share),
            format.probability(exit.threshold),
            format.milliseconds(exit.ms),
            format.percent(exit.agreement),
            format.number(exit.temperature),
            " -> ".join(map(format.number, errors)),
        )
    table.add_row("the end", format.percent(exits.end_share), "", format.milliseconds(exits.end_ms), "", "", "")
    console.print(table)
    when = format.probability(exits.threshold) if exits.threshold <= 1 else "above 1: none leaves early"
    console.print(f"{escape(exits.note[:1].upper() + exits.note[1:])}. Threshold: {when}")
    display.show_latency(console, report)
    display.show_agreement(console, report)
    display.show_skipped(console, report)
    display.show_seconds(report.seconds)
    console.print(f"Artifact: {escape(str(folder))} (report.html shows it)", soft_wrap=True)
