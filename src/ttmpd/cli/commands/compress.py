"""The main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import choose_methods, parse_duration, parse_targets, parts_of
from ttmpd.cli.commands._reporting import TARGET_MISSED, command_line, reporting, show_machine

if TYPE_CHECKING:
    from ttmpd.artifact.write import Result
    from ttmpd.models.opened import OpenedModel
    from ttmpd.pipeline.settings import Target


def command(
    model: option.Model,
    data: option.Data,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the artifact.")] = None,
    speedup: option.Speedup = None,
    latency: option.Latency = None,
    macs: Annotated[str | None, typer.Option("--macs", help='Instead: a share of the MACs, "0.7x".')] = None,
    targets: Annotated[str | None, typer.Option("--targets", help="Several: 0.8x,0.5x. A sub-folder each.")] = None,
    num_samples: option.NumSamples = 500,
    holdout: option.Holdout = 0.15,
    batch_size: option.BatchSize = 64,
    device: option.Device = "auto",
    runtime: option.Runtime = "eager",
    seed: option.Seed = 0,
    steps: option.Steps = None,
    select: Annotated[str, typer.Option("--select", help="A selector: which samples of the pool.")] = "random",
    pool: Annotated[int, typer.Option("--pool", min=2, help="Samples that a selector looks at.")] = 5000,
    adapt: Annotated[str, typer.Option("--adapt", help="An adapter, or none.")] = "norm",
    score: Annotated[str, typer.Option("--score", help="A scorer.")] = "ttmpd",
    plan: Annotated[str, typer.Option("--plan", help="A planner.")] = "knapsack",
    distill: Annotated[str, typer.Option("--distill", help="A distiller.")] = "one_time",
    settings: Annotated[list[str] | None, typer.Option("--set", help="VERB.FIELD=VALUE, as often as wanted.")] = None,
    units: option.Units = option.UNITS,
    lossless: Annotated[
        bool, typer.Option("--lossless/--no-lossless", help="First what makes it faster and changes no answer.")
    ] = True,
    actions: Annotated[
        str, typer.Option("--actions", help="Some of drop, linear, conv, narrow.")
    ] = "drop,linear,narrow",
    time_budget: Annotated[str | None, typer.Option("--time-budget", help="e.g. 90s, 10min, 1h.")] = None,
    amp: Annotated[str, typer.Option("--amp", help="Mixed precision: auto, on or off.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    max_length: option.MaxLength = None,
    task: option.Task = None,
    source: option.Source = None,
    weights: option.Weights = None,
    no_pretrained: option.Pretrained = False,
    verbose: option.Verbose = False,
) -> None:
    """Make a model faster and adapted to unlabelled samples; the artifact holds the proof."""
    if sum(given is not None for given in (speedup, latency, macs, targets)) != 1:
        raise typer.BadParameter("give exactly one of --speedup, --latency, --macs and --targets")
    if output is None and not dry_run:
        raise typer.BadParameter("give --output DIR, or --dry-run to plan only")
    kept = None if dry_run else output
    with reporting(verbose, resumable=kept):
        methods = choose_methods(
            {"select": select, "adapt": adapt, "score": score, "plan": plan, "distill": distill, "runtime": runtime},
            settings or [],
            steps,
        )
        goals = parse_targets(speedup, latency, macs, targets)
        given: dict[str, Any] = methods | {
            "num_samples": num_samples, "pool": pool, "holdout": holdout, "batch_size": batch_size, "device": device,
            "seed": seed, "units": parts_of(units), "actions": parts_of(actions), "amp": amp,
            "lossless": lossless,
        }  # fmt: skip
        if time_budget is not None:
            given["time_budget"] = parse_duration(time_budget)
        opened = option.open_chosen(model, source, weights, no_pretrained, max_length, task)
        if kept is None:
            _dry_run(opened, data, goals, given)
        else:
            _compress(opened, data, goals, kept, resume, given, several=targets is not None)


def _dry_run(opened: "OpenedModel", data: str, goals: "dict[str, Target]", given: dict[str, Any]) -> None:
    from ttmpd.pipeline.inspect import preview

    show_machine(given["device"])
    display.show_preview(preview(opened, data, targets=list(goals.values()), **given))


def _compress(
    opened: "OpenedModel",
    data: str,
    goals: "dict[str, Target]",
    output: Path,
    resume: bool,
    given: dict[str, Any],
    *,
    several: bool,
) -> None:
    from ttmpd.pipeline.compress import compress_many

    show_machine(given["device"])
    folders = [output / name for name in goals] if several else [output]
    results = compress_many(
        opened, data, targets=list(goals.values()), outputs=folders, resume=resume, command=command_line(), **given
    )
    for result, folder in zip(results, folders, strict=True):
        display.show_result(result, folder)
    if not all(result.met for result in results):
        display.show_error("Target missed", f"{_best(results)}; the artifact is kept")
        raise typer.Exit(TARGET_MISSED)


def _best(results: "list[Result]") -> str:
    if results[0].facts["target"]["budget_ms"] is None:
        return f"{results[0].facts['student']['macs'] / results[0].facts['model']['macs']:.3g} of the MACs are left"
    best = min(result.facts["latency"]["compressed"]["median_ms"] for result in results)
    return f"the fastest that was measured is {best:.4g} ms"
