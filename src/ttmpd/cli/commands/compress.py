"""``ttmpd compress``: the main job."""

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
ACTIONS_TEXT = ",".join(ACTIONS)

Macs = Annotated[
    str | None,
    typer.Option("--macs", metavar="0.7x", help="A share of the multiply-accumulates.", rich_help_panel=option.TARGET),
]
Targets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        metavar="0.8x,0.5x",
        help="Several latencies, each in a sub-folder.",
        rich_help_panel=option.TARGET,
    ),
]
Pool = Annotated[
    int,
    typer.Option(
        "--pool", min=2, metavar="N", help="Samples that a selector chooses from.", rich_help_panel=option.DATA
    ),
]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless/--no-lossless",
        help="First take what makes the model faster without changing its predictions.",
        rich_help_panel=option.METHODS,
    ),
]
Actions = Annotated[
    str,
    typer.Option(
        "--actions",
        metavar="ACTION,...",
        help=f"What may be done to units: some of {', '.join(ACTIONS)}.",
        rich_help_panel=option.METHODS,
    ),
]
TimeBudget = Annotated[
    str | None,
    typer.Option(
        "--time-budget", metavar="90s|10min|1h", help="About so long the run may take.", rich_help_panel=option.RUN
    ),
]
Amp = Annotated[
    str,
    typer.Option("--amp", metavar="auto|on|off", help="Mixed precision in training.", rich_help_panel=option.RUN),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.", rich_help_panel=option.RUN)]


@option.with_options
def command(
    model: option.Model,
    data: option.Data,
    run: option.Run,
    output: option.OutputIfWanted = None,
    speedup: option.Speedup = None,
    latency: option.Latency = None,
    macs: Macs = None,
    targets: Targets = None,
    num_samples: option.NumSamples = defaults.NUM_SAMPLES,
    holdout: option.Holdout = defaults.HOLDOUT,
    pool: Pool = defaults.POOL,
    select: Annotated[str, option.method("select", "Chooses the samples.")] = defaults.METHODS["select"],
    adapt: Annotated[str, option.method("adapt", "Adapts the model; or none.")] = defaults.METHODS["adapt"],
    score: Annotated[str, option.method("score", "Predicts the harm of removals.")] = defaults.METHODS["score"],
    plan: Annotated[str, option.method("plan", "Chooses what is removed.")] = defaults.METHODS["plan"],
    distill: Annotated[str, option.method("distill", "Trains the student.")] = defaults.METHODS["distill"],
    settings: option.Set = None,
    units: option.Units = None,
    actions: Actions = ACTIONS_TEXT,
    lossless: Lossless = True,
    runtime: option.Runtime = defaults.METHODS["runtime"],
    batch_size: option.BatchSize = defaults.BATCH_SIZE,
    steps: option.Steps = None,
    time_budget: TimeBudget = None,
    amp: Amp = defaults.AMP,
    dry_run: DryRun = False,
    resume: option.Resume = False,
) -> None:
    """Make a model faster and adapt it to unlabelled samples; the artifact holds the measurements."""
    if sum(target is not None for target in (speedup, latency, macs, targets)) != 1:
        raise typer.BadParameter("give exactly one of --speedup, --latency, --macs and --targets")
    if output is None and not dry_run:
        raise typer.BadParameter("give --output DIR, or --dry-run to plan only")
    folder = None if dry_run else output
    with reporting(run.verbose, resumable=folder):
        methods = choose_methods(
            {"select": select, "adapt": adapt, "score": score, "plan": plan, "distill": distill, "runtime": runtime},
            settings or [],
            steps,
        )
        goals = parse_targets(speedup, latency, macs, targets)
        values: dict[str, Any] = methods | {
            "num_samples": num_samples,
            "pool": pool,
            "holdout": holdout,
            "batch_size": batch_size,
            "device": run.device,
            "seed": run.seed,
            "actions": parts_of(actions),
            "amp": amp,
            "lossless": lossless,
        }
        if units is not None:
            values["units"] = parts_of(units)
        if time_budget is not None:
            values["time_budget"] = parse_duration(time_budget)
        opened = model.open()
        show_machine(run.device)
        if folder is None:
            _dry_run(opened, data, goals, values)
        else:
            _compress(opened, data, goals, [folder / name for name in goals], resume=resume, settings=values)


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
    if results[0].facts["target"]["budget_ms"] is None:
        return f"{results[0].facts['student']['macs'] / results[0].facts['model']['macs']:.3g} of the MACs are left"
    best = min(result.facts["latency"]["compressed"]["median_ms"] for result in results)
    return f"the fastest that was measured is {best:.4g} ms"


def _show(result: "Result", folder: Any) -> None:
    """What one run did, what it measured, and where it lies."""
    console, facts = display.out(), result.facts
    console.print(f"Adaptation: {escape(facts['adapt']['note'])}")
    removed = [unit for unit in facts["units"] if unit["action"] != "keep"]
    table = display.new_table(
        "removed unit", "class", "action", "saves ms", "harm", right=("saves ms", "harm"), title="Plan"
    )
    for unit in removed:
        harm = unit.get(f"harm_{unit['action']}", dict(unit.get("width_harms", [])).get(unit.get("kept")))
        table.add_row(
            escape(unit["id"]),
            escape(unit["module"]),
            f"{unit['kept']} of {unit['members']} stay" if unit.get("members") else unit["action"],
            format.milliseconds(unit["saved_ms"]),
            "" if harm is None else f"{harm:.3g}",
        )
    if removed:
        console.print(table)
    console.print(f"{len(removed) or 'None'} of {len(facts['units'])} units removed or narrowed.")
    display.show_latency(console, facts)
    display.show_agreement(console, facts)
    display.show_skipped(console, facts)
    display.show_seconds(facts["seconds"])
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
            f"{len(plan.removals)} of {len(analysis.found.units)} units; "
            f"{format.milliseconds(plan.original_ms)} ms now, predicted {format.milliseconds(plan.predicted_ms)} ms"
            + ("" if nearest is None else f", measured on the cut model {format.milliseconds(nearest)} ms")
        )
    columns = ("share of latency", "predicted ms", "predicted harm", "units removed")
    table = display.new_table(*columns, title="What could be reached")
    for row in found.plans[0].front:
        table.add_row(
            f"{row['target']:g}x",
            format.milliseconds(row["predicted_ms"]),
            f"{row['harm']:.3g}",
            f"{row['n_removed']:g}",
        )
    if table.row_count:
        console.print(table)
    display.show_seconds(found.seconds)
    console.print("Dry run: nothing was written.")
