"""The command line: parses, calls, prints. Everything heavy is imported when a command runs."""

import contextlib
import logging
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttmpd import display
from ttmpd.errors import BudgetUnreachableError, InvalidValueError, TTMPDError
from ttmpd.memory import keep_freed_memory

if TYPE_CHECKING:
    from ttmpd.models import OpenedModel
    from ttmpd.settings import Target

FAILED, TARGET_MISSED, INTERRUPTED = 1, 3, 130
"""Exit codes; wrong usage is 2."""

app = typer.Typer(
    name="ttmpd",
    help="Make a pretrained vision model faster on this device, adapted to your images, without labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_MODEL = "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:/directory, FILE.py:factory, package.module:factory"
ModelOption = Annotated[str, typer.Option("--model", help=f"{_MODEL}, or an artifact folder.")]
DataOption = Annotated[str, typer.Option("--data", help="A folder of images, or a .npz or .npy file.")]
MaybeDataOption = Annotated[str | None, typer.Option("--data", help="Real inputs; random values when left out.")]
SourceOption = Annotated[
    str | None, typer.Option("--source", help="The original model of an artifact that came from your own code.")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="A .safetensors file to load instead of the published weights.")
]
PretrainedOption = Annotated[bool, typer.Option("--no-pretrained", help="Random weights: nothing is downloaded.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Say more, and show where an error came from.")]


@app.command("inspect")
def inspect_command(
    model: ModelOption,
    data: MaybeDataOption = None,
    batch_size: BatchSizeOption = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    device: DeviceOption = "auto",
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Measure milliseconds on this device.")] = True,
    source: SourceOption = None,
    weights: WeightsOption = None,
    no_pretrained: PretrainedOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List what can be removed from a model, what cannot and why; nothing is changed."""
    with _reporting(verbose):
        from ttmpd.inspection import inspect
        from ttmpd.stages import disk_guarded, write_json

        opened = _opened(model, source, weights, no_pretrained)
        found = inspect(opened, data, batch_size=batch_size, device=device, timed=timed)
        display.show_inspection(found)
        if json_file is not None:
            with disk_guarded(json_file):
                write_json(json_file, found.to_dict())


@app.command("compress")
def compress_command(
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the artifact.")] = None,
    speedup: Annotated[float | None, typer.Option("--speedup", help="Times faster, e.g. 2.0.")] = None,
    latency: Annotated[str | None, typer.Option("--latency", help='"12ms" per batch, or "0.5x" of now.')] = None,
    targets: Annotated[str | None, typer.Option("--targets", help="Several: 0.8x,0.5x. A sub-folder each.")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=2, help="Unlabelled samples to use.")] = 500,
    holdout: Annotated[float, typer.Option("--holdout", help="Share of them that is held out.")] = 0.15,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Distillation steps [default: 200].")] = None,
    select: Annotated[str, typer.Option("--select", help="A selector: which samples of the pool.")] = "random",
    pool: Annotated[int, typer.Option("--pool", min=2, help="Samples that a selector looks at.")] = 5000,
    adapt: Annotated[str, typer.Option("--adapt", help="An adapter, or none.")] = "norm",
    score: Annotated[str, typer.Option("--score", help="A scorer.")] = "ttmpd",
    plan: Annotated[str, typer.Option("--plan", help="A planner.")] = "knapsack",
    distill: Annotated[str, typer.Option("--distill", help="A distiller.")] = "one_time",
    settings: Annotated[list[str] | None, typer.Option("--set", help="VERB.FIELD=VALUE, as often as wanted.")] = None,
    actions: Annotated[str, typer.Option("--actions", help="Some of drop, linear, conv.")] = "drop,linear",
    time_budget: Annotated[str | None, typer.Option("--time-budget", help="e.g. 90s, 10min, 1h.")] = None,
    amp: Annotated[str, typer.Option("--amp", help="Mixed precision: auto, on or off.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    source: SourceOption = None,
    weights: WeightsOption = None,
    no_pretrained: PretrainedOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a model faster and adapted to unlabelled samples; the artifact holds the proof."""
    if sum(given is not None for given in (speedup, latency, targets)) != 1:
        raise typer.BadParameter("give exactly one of --speedup, --latency and --targets")
    if output is None and not dry_run:
        raise typer.BadParameter("give --output DIR, or --dry-run to plan only")
    kept = None if dry_run else output
    with _reporting(verbose, resumable=kept):
        methods = choose_methods(
            {"select": select, "adapt": adapt, "score": score, "plan": plan, "distill": distill}, settings or [], steps
        )
        goals = parse_targets(speedup, latency, targets)
        given: dict[str, Any] = methods | {
            "num_samples": num_samples, "pool": pool, "holdout": holdout, "batch_size": batch_size, "device": device,
            "seed": seed, "actions": tuple(part.strip() for part in actions.split(",") if part.strip()), "amp": amp,
        }  # fmt: skip
        if time_budget is not None:
            given["time_budget"] = parse_duration(time_budget)
        opened = _opened(model, source, weights, no_pretrained)
        if kept is None:
            _dry_run(opened, data, goals, given)
        else:
            _compress(opened, data, goals, kept, resume, given, several=targets is not None)


def _dry_run(opened: "OpenedModel", data: str, goals: "dict[str, Target]", given: dict[str, Any]) -> None:
    from ttmpd.inspection import preview

    _show_machine(given["device"])
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
    from ttmpd.pipeline import compress_many

    _show_machine(given["device"])
    folders = [output / name for name in goals] if several else [output]
    results = compress_many(
        opened, data, targets=list(goals.values()), outputs=folders, resume=resume, command=_command(), **given
    )
    for result, folder in zip(results, folders, strict=True):
        display.show_result(result, folder)
    if not all(result.met for result in results):
        best = min(result.facts["latency"]["compressed"]["median_ms"] for result in results)
        display.show_error("Target missed", f"the fastest that was measured is {best:.4g} ms; the artifact is kept")
        raise typer.Exit(TARGET_MISSED)


@app.command("evaluate")
def evaluate_command(
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
    with _reporting(verbose):
        from ttmpd.evaluation import evaluate, open_any
        from ttmpd.stages import disk_guarded, write_json

        opened = _opened(model, source, weights, no_pretrained)
        other = None if against is None else open_any(against, source)
        found = evaluate(opened, data, labels, against=other, batch_size=batch_size, device=device)
        display.show_evaluation(found)
        if json_file is not None:
            with disk_guarded(json_file):
                write_json(json_file, found.to_dict())


@app.command("bench")
def bench_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact folder.")],
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", help="As often as wanted.")] = None,
    data: MaybeDataOption = None,
    device: DeviceOption = "auto",
    source: SourceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Time original and compressed, interleaved, on this machine."""
    with _reporting(verbose):
        from ttmpd.evaluation import bench
        from ttmpd.settings import choose_device
        from ttmpd.timing import machine

        rows = bench(folder, source, batch_sizes=batch_size or (), data=data, device=device)
        display.show_bench(rows, machine(choose_device(device)))


@app.command("methods")
def methods_command(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a page of the docs.")] = False,
) -> None:
    """List every method of every verb, read from the files."""
    with _reporting(False):
        from ttmpd.method import listing, markdown

        if as_markdown:
            typer.echo(markdown(listing()), nl=False)
        else:
            display.show_methods(listing())


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option("--output", help="Folder for the artifact.")] = Path("artifacts/demo"),
    verbose: VerboseOption = False,
) -> None:
    """The whole thing on handwritten digits: no download, no GPU, under 90 seconds on 2 cores."""
    with _reporting(verbose):
        from ttmpd.demo_run import run_demo

        outcome = run_demo(output)
        display.show_demo(outcome)
        if not outcome.result.met:
            display.show_error("Target missed", "this machine is busy, or gains less from removed blocks")
            raise typer.Exit(TARGET_MISSED)


# ------------------------------------------------------------------------------------------------------------- parsing


def parse_duration(text: str) -> float:
    """Seconds.

    Example:
        >>> parse_duration("90s"), parse_duration("10min"), parse_duration("1.5h")
        (90.0, 600.0, 5400.0)
    """
    units = {"min": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0}
    value = text.strip().lower()
    unit = next((unit for unit in units if value.endswith(unit)), "")
    try:
        seconds = float(value.removesuffix(unit)) * units.get(unit, 1.0)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidValueError(f"time-budget must be like 90s, 10min or 1h, but got {text!r}")
    return seconds


def parse_targets(speedup: float | None, latency: str | None, targets: str | None) -> "dict[str, Target]":
    """Targets by name; the name is the sub-folder when there are several."""
    from ttmpd.settings import Target

    if speedup is not None:
        return {"": Target(speedup=speedup)}
    if latency is not None:
        return {"": Target.parse(latency)}
    names = [name.strip() for name in (targets or "").split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise InvalidValueError(f"targets must be different latencies like 0.8x,0.5x, but got {targets!r}")
    return {name: Target.parse(name) for name in names}


def choose_methods(names: dict[str, str], settings: Sequence[str], steps: int | None) -> dict[str, Any]:
    """A method per verb with its settings.

    Args:
        names: file name per verb.
        settings: VERB.FIELD=VALUE each.
        steps: of the distiller; None keeps its default.

    Raises:
        UnknownMethodError: no file bears a name.
        InvalidValueError: a setting has another form, verb or field.
    """
    from ttmpd.method import method_class

    given: dict[str, dict[str, str]] = {verb: {} for verb in names}
    for text in settings:
        key, equals, value = text.partition("=")
        verb, dot, field = key.strip().partition(".")
        if not (equals and dot and field) or verb not in given:
            known = ", ".join(given)
            raise InvalidValueError(f"a setting must be VERB.FIELD=VALUE with VERB one of {known}, but got {text!r}")
        given[verb][field] = value.strip()
    if steps is not None:
        given["distill"].setdefault("steps", str(steps))
    return {verb: method_class(verb, name)().with_settings(**given[verb]) for verb, name in names.items()}


def _opened(model: str, source: str | None, weights: Path | None, no_pretrained: bool) -> "OpenedModel":
    from ttmpd.checkpoint import is_artifact, open_artifact
    from ttmpd.models import open_model

    if not is_artifact(model):
        return open_model(model, weights=weights, pretrained=not no_pretrained)
    if weights is not None or no_pretrained:
        raise InvalidValueError(
            f"an artifact must keep its own weights, but {model!r} got --weights or --no-pretrained"
        )
    return open_artifact(model, source)


# ----------------------------------------------------------------------------------------------------------- reporting


@contextlib.contextmanager
def _reporting(verbose: bool, resumable: Path | None = None) -> Iterator[None]:
    """Errors as short messages with exit codes, progress on a terminal, the log on standard error."""
    keep_freed_memory()
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ttmpd").setLevel(level)
    try:
        with display.progress_shown():
            yield
    except TTMPDError as error:
        if verbose:
            traceback.print_exc()
        display.show_error(_title(error), str(error))
        raise typer.Exit(TARGET_MISSED if isinstance(error, BudgetUnreachableError) else FAILED) from None
    except KeyboardInterrupt:
        kept = "nothing was written"
        if resumable is not None:
            again = _command() if "--resume" in sys.argv else f"{_command()} --resume"
            kept = f"finished stages are kept in {resumable}; go on with: {again}"
        display.show_error("Interrupted", kept)
        raise typer.Exit(INTERRUPTED) from None


def _title(error: TTMPDError) -> str:
    words = {
        "InvalidValueError": "Wrong value",
        "UnsupportedError": "Not supported",
        "SamplesError": "No usable samples",
        "BudgetUnreachableError": "Target out of reach",
        "UnknownMethodError": "No such method",
        "MissingPackageError": "Package missing",
        "ModelError": "Model cannot be used",
        "CheckpointError": "Artifact cannot be used",
    }
    return words.get(type(error).__name__, "Error")


def _show_machine(device: str) -> None:
    from ttmpd.settings import choose_device
    from ttmpd.timing import machine

    display.show_machine(machine(choose_device(device)))


def _command() -> str:
    """The command as it was typed."""
    return shlex.join(["ttmpd", *sys.argv[1:]])


if __name__ == "__main__":
    app()
