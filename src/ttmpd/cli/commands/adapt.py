"""``ttmpd adapt``: a model adapted to the data, with nothing removed."""

from typing import TYPE_CHECKING, Annotated

from rich.markup import escape

from ttmpd.artifact import format
from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import choose_methods
from ttmpd.cli.commands._reporting import reporting, show_machine
from ttmpd.pipeline import defaults

if TYPE_CHECKING:
    from ttmpd.artifact.write import Result

PLACE = 50
EXAMPLES = (
    "ttmpd adapt --model timm:resnet50 --data photos/ --output adapted/",
    "ttmpd adapt --model timm:resnet50 --data photos/ --adapt eata --set adapt.epochs=2 --output adapted/",
)


@option.with_options
def command(
    model: option.Model,
    samples: option.Calibration,
    output: option.Output,
    run: option.Run,
    adapt: Annotated[str, option.method("adapt", "How the model is adapted.")] = defaults.METHODS["adapt"],
    method_settings: option.Set = None,
) -> None:
    """Adapt a model to unlabelled samples; nothing is removed."""
    with reporting(run.verbose):
        from ttmpd.pipeline.adapt import adapt_to

        method = choose_methods({"adapt": adapt}, method_settings or [], None)
        settings = samples.settings() | run.settings() | method
        opened = model.open()
        show_machine(run.device)
        _show(adapt_to(opened, samples.data, output=output, **settings), output)


def _show(result: "Result", folder: object) -> None:
    """What was done to the model, how far its answers moved, and where the artifact lies."""
    console, report = display.out(), result.report
    assert report.adaptation is not None
    console.print(f"Adaptation: {escape(report.adaptation.note)}")
    table = display.new_table("", "value", title="Measured while adapting")
    for name, value in report.adaptation.numbers.items():
        table.add_row(escape(name.replace("_", " ")), format.probability(value))
    if report.adaptation.numbers:
        console.print(table)
    display.show_agreement(console, report)
    display.show_skipped(console, report)
    display.show_seconds(report.seconds)
    console.print(f"Artifact: {escape(str(folder))} (evaluate it with labels, or compress it)", soft_wrap=True)
