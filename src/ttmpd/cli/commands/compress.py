"""``ttmpd compress``: the main job."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ttmpd.artifact import format
from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import choose_methods, parse_duration, parse_targets, parts_of
from ttmpd.cli.commands._reporting import TARGET_MISSED, command_line, reporting, show_machine
from ttmpd.pipeline import defaults
from ttmpd.records import ACTIONS, WidthUnit

if TYPE_CHECKING:
    from ttmpd.artifact.write import Result
    from ttmpd.models.opened import OpenedModel
    from ttmpd.pipeline.inspect import Preview
    from ttmpd.pipeline.settings import Target

PLACE = 20
"""In ``ttmpd --help``: commands are listed by their place."""
EXAMPLES = (
    "ttmpd compress --model timm:resnet50 --data photos/ --speedup 1.5 --output fast/",
    "ttmpd compress --model timm:resnet50 --data photos/ --targets 0.8x,0.5x --dry-run",
    "ttmpd compress --model hf:ORG/NAME --data reviews.tsv --latency 12ms --output fast/",
)
ACTIONS_TEXT = ",".join(ACTIONS)


@dataclass(frozen=True, slots=True)
class Targets(option.Target):
    """How fast the result shall be, or the results."""

    macs: Annotated[
        str | None,
        option.option("--macs", "Share of the multiply-accumulates that may stay; promises no latency.", option.TARGET,
                      metavar="0.7x"),
    ] = None  # fmt: skip
    targets: Annotated[
        str | None,
        option.option("--targets", "Several latencies; each result in a sub-folder of --output.", option.TARGET,
                      metavar="0.8x,0.5x"),
    ] = None  # fmt: skip


@dataclass(frozen=True, slots=True)
class Calibration(option.Calibration):
    """The samples, and those among which they are chosen."""

    pool: Annotated[
        int,
        option.option("--pool", "How many samples a selector other than random chooses from.", option.DATA, min=2,
                      metavar="N"),
    ] = defaults.POOL  # fmt: skip


@dataclass(frozen=True, slots=True)
class Methods:
    """How each stage is done."""

    select: Annotated[str, option.method("select", "Chooses the samples.")] = defaults.METHODS["select"]
    adapt: Annotated[str, option.method("adapt", "Adapts the model to the samples; or none.")] = defaults.METHODS[
        "adapt"
    ]
    score: Annotated[str, option.method("score", "Predicts the harm of each removal.")] = defaults.METHODS["score"]
    plan: Annotated[str, option.method("plan", "Chooses what is removed.")] = defaults.METHODS["plan"]
    distill: Annotated[str, option.method("distill", "Trains the student.")] = defaults.METHODS["distill"]
    runtime: option.Runtime = defaults.METHODS["runtime"]
    method_settings: option.Set = None
    steps: option.Steps = None
    units: option.Units = None
    actions: Annotated[
        str,
        option.option("--actions", f"What may be done to units: some of {', '.join(ACTIONS)}.", option.METHODS,
                      metavar="ACTION,..."),
    ] = ACTIONS_TEXT  # fmt: skip
    lossless: Annotated[
        bool,
        option.flag("--lossless/--no-lossless", "First take what is faster with the same predictions.",
                    option.METHODS),
    ] = True  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """As fields of :class:`ttmpd.Settings`."""
        verbs = ("select", "adapt", "score", "plan", "distill", "runtime")
        methods = {verb: getattr(self, verb) for verb in verbs}
        values = choose_methods(methods, self.method_settings or [], self.steps)
        values |= {"actions": parts_of(self.actions), "lossless": self.lossless}
        return values if self.units is None else values | {"units": parts_of(self.units)}


@dataclass(frozen=True, slots=True)
class Run(option.Run):
    """On what it runs, and how long."""

    time_budget: Annotated[
        str | None,
        option.option("--time-budget", "About so long the run may take.", option.RUN, metavar="90s|10min|1h"),
    ] = None
    amp: Annotated[str, option.option("--amp", "Mixed precision in training.", option.RUN, metavar="auto|on|off")] = (
        defaults.AMP
    )

    def settings(self) -> dict[str, Any]:
        """As fields of :class:`ttmpd.Settings`."""
        values = option.Run.settings(self) | {"amp": self.amp}
        return values if self.time_budget is None else values | {"time_budget": parse_duration(self.time_budget)}


@option.with_options
def command(
    model: option.Model,
    samples: Calibration,
    target: Targets,
    methods: Methods,
    run: Run,
    output: option.OutputIfWanted = None,
    dry_run: Annotated[bool, option.flag("--dry-run", "Plan only; write nothing.", option.RUN)] = False,
    resume: option.Resume = False,
) -> None:
    """Make a model faster, adapted to your samples; the artifact holds the measurements."""
    asked = target.settings()
    if output is None and not dry_run:
        raise typer.BadParameter("give --output DIR for the artifact, or --dry-run to plan only")
    folder = None if dry_run else output
    with reporting(run.verbose, resumable=folder):
        settings = samples.settings() | methods.settings() | run.settings()
        goals = parse_targets(**asked)
        opened = model.open()
        show_machine(run.device)
        if folder is None:
            _dry_run(opened, samples.data, goals, settings)
        else:
            folders = [folder / name for name in goals]
            _compress(opened, samples.data, goals, folders, resume=resume, settings=settings)


def _dry_run(opened: "OpenedModel", data: str, goals: "dict[str, Target]", settings: dict[str, Any]) -> None:
    from ttmpd.pipeline.inspect import preview

    _show_preview(preview(opened, data, targets=list(goals.values()), **settings))


def _compress(
    opened: "OpenedModel",
    data: str,
    goals: "dict[str, Target]",
    folders: list[Path],
    *,
    resume: bool,
    settings: dict[str, Any],
) -> None:
    from ttmpd.pipeline.compress import compress_many

    results = compress_many(
        opened, data, targets=list(goals.values()), outputs=folders, resume=resume, command=command_line(), **settings
    )
    for result, folder in zip(results, folders, strict=True):
        _show(result, folder)
    if not all(result.met for result in results):
        display.show_error("Target missed", f"{_best(results)}; the artifact is kept")
        raise typer.Exit(TARGET_MISSED)


def _best(results: "list[Result]") -> str:
    reports = [result.report for result in results]
    latencies = [report.latency.compressed.median_ms for report in reports if report.latency]
    target, (model, student) = reports[0].target, (reports[0].model, reports[0].student)
    if target is not None and target.budget_ms is None:
        return f"{format.percent((student.macs or 0) / model.macs)} of the MACs are left"
    return f"the fastest that was measured is {format.milliseconds(min(latencies))} ms"


def _show(result: "Result", folder: Path) -> None:
    """What one run did, what it measured, and where it lies."""
    console, report = display.out(), result.report
    if report.adaptation is not None:
        console.print(f"Adaptation: {escape(report.adaptation.note)}")
    table = display.new_table(
        "removed unit", "class", "action", "saves ms", "harm", right=("saves ms", "harm"), title="Plan"
    )
    for unit in report.removed:
        action = f"{unit.n_kept} of {unit.n_members} stay" if unit.n_members else unit.action
        figures = format.milliseconds(unit.saved_ms), format.number(unit.harm)
        table.add_row(escape(unit.id), escape(unit.module), action, *figures)
    if report.removed:
        console.print(table)
    console.print(f"{len(report.removed) or 'None'} of {len(report.units)} units removed or narrowed.")
    display.show_latency(console, report)
    display.show_agreement(console, report)
    display.show_skipped(console, report)
    display.show_seconds(report.seconds)
    console.print(f"Artifact: {escape(str(folder))} (report.html shows it)", soft_wrap=True)


def _show_preview(found: "Preview") -> None:
    """The plans and the front of a dry run."""
    console, analysis = display.out(), found.analysis
    console.print(f"Adaptation: {escape(analysis.adapt_note)}")
    for planned in found.plans:
        plan = planned.plan
        table = display.new_table("would remove", "class", "action", title=f"Plan for {planned.target}")
        for removal in plan.removals:
            unit, action = removal.unit, str(removal.action)
            if isinstance(unit, WidthUnit):
                action = f"keep {len(removal.kept)} of {unit.n_members}"
            table.add_row(escape(unit.id), escape(unit.module), action)
        console.print(table)
        tried = [attempt.measured_ms for attempt in planned.attempts]
        nearest = min(tried, key=lambda value: abs(value - plan.budget_ms), default=None)
        console.print(
            f"{len(plan.removals)} of {len(analysis.units)} units; "
            f"{format.milliseconds(plan.original_ms)} ms now, predicted {format.milliseconds(plan.predicted_ms)} ms"
            + ("" if nearest is None else f", measured on the cut model {format.milliseconds(nearest)} ms")
        )
    columns = ("share of latency", "predicted ms", "predicted harm", "units removed")
    table = display.new_table(*columns, title="What could be reached")
    for row in found.plans[0].pareto_front:
        table.add_row(
            f"{row['target']:g}x",
            format.milliseconds(row["predicted_ms"]),
            format.number(row["harm"]),
            f"{row['n_removed']:g}",
        )
    if table.row_count:
        console.print(table)
    display.show_seconds(found.seconds)
    console.print("Dry run: nothing was written.")
