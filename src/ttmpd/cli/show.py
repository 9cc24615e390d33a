"""What the command line shows: tables, lines, progress bars. Numbers come in finished."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ttmpd.progress import watched
from ttmpd.records import WidthUnit

if TYPE_CHECKING:
    from ttmpd.artifact.write import Result
    from ttmpd.demo.run import DemoOutcome
    from ttmpd.pipeline.bench import BenchRow
    from ttmpd.pipeline.evaluate import Evaluation
    from ttmpd.pipeline.inspect import Inspection, Preview
    from ttmpd.records import Timing

SHOW_AFTER = 1.0
"""Seconds before a stage gets a bar."""
MAX_LISTED = 10

NOT_ACCURACY = "agreement with the teacher, not accuracy"

# ------------------------------------------------------------------------------------------------------------- console


def out() -> Console:
    """Standard output; wide enough for tables when it is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def err() -> Console:
    """Standard error."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=120)


def show_error(title: str, message: str) -> None:
    """A short red panel on standard error."""
    err().print(Panel(escape(message), title=escape(title), title_align="left", border_style="red"))


class _Bars:
    """A progress bar for every stage that takes more than a second."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started: dict[str, float] = {}
        self.bars: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        started = self.started.setdefault(stage, now)
        if total and done >= total:
            self.started.pop(stage)
            if stage in self.bars:
                self.progress.remove_task(self.bars.pop(stage))
            return
        if stage not in self.bars:
            if now - started < SHOW_AFTER:
                return
            self.bars[stage] = self.progress.add_task(escape(stage), total=total or None)
        self.progress.update(self.bars[stage], completed=done, total=total or None)


@contextlib.contextmanager
def progress_shown() -> Iterator[None]:
    """Progress bars with the time that is left, on a terminal; silent anywhere else."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Few refreshes: the bars share the processor with what is being timed.
    with (
        Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress,
        watched(_Bars(progress)),
    ):
        yield


# --------------------------------------------------------------------------------------------------------------- words


def ms(value: float) -> str:
    """Milliseconds with three figures or more."""
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(timing: "Timing | Mapping[str, Any]") -> str:
    """Median and quartiles in milliseconds."""
    get = timing.__getitem__ if isinstance(timing, Mapping) else lambda key: getattr(timing, key)
    return f"{ms(get('median_ms'))} ms ({ms(get('low_ms'))} to {ms(get('high_ms'))})"


def count(value: float) -> str:
    """Three figures with k, M or G."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:g}"


def percent(interval: Any) -> str:
    """A share with its interval, from a record or plain data."""
    get = interval.__getitem__ if isinstance(interval, Mapping) else lambda key: getattr(interval, key)
    return f"{get('share'):.1%} ({get('low'):.1%} to {get('high'):.1%})"


def _table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def machine_line(machine: Mapping[str, Any]) -> str:
    """Device, threads and torch version."""
    threads = machine["threads"]
    plural = "thread" if threads == 1 else "threads"
    return f"Device: {machine['device']} ({machine['type']}), {threads} {plural}, torch {machine['torch']}"


def show_machine(machine: Mapping[str, Any]) -> None:
    """What the milliseconds will belong to."""
    out().print(escape(machine_line(machine)))


# ------------------------------------------------------------------------------------------------------------ commands


def show_inspection(found: "Inspection") -> None:
    """The units, and what cannot be removed."""
    console, timed = out(), found.whole is not None
    console.print(escape(machine_line(found.machine)))
    whole = f", {spread(found.whole)} per batch of {found.batch_size}" if found.whole else ""
    size = f"{count(found.parameters)} parameters, {count(found.macs)} MACs"
    console.print(f"{escape(found.model)}: {size} for an input of {found.input_shape}{whole}")
    if found.units:
        extra = ("ms", "of ms", "linear ms") if timed else ()
        numbers = ("parameters", "MACs", "of MACs", *extra)
        table = _table("unit", "class", "shape", *numbers, right=numbers)
        for unit in found.to_dict()["units"]:
            linear = ms(unit["linear_ms"]) if "linear_ms" in unit else ""
            times = (ms(unit["ms"]), f"{unit['ms_share']:.1%}", linear) if timed else ()
            shape = "x".join(map(str, unit["shape"]))
            sizes = (count(unit["n_params"]), count(unit["macs"]), f"{unit['macs_share']:.1%}")
            table.add_row(escape(unit["id"]), escape(unit["module"]), shape, *sizes, *times)
        console.print(table)
        console.print(f"{len(found.units)} removable units hold {found.removable_share:.1%} of the MACs.")
    else:
        console.print("Nothing is removable: no block answers with the shape of its input and can be skipped.")
    if found.refused:
        table = _table("cannot be removed", "why")
        for path, reason in _grouped(found.refused):
            table.add_row(escape(path), escape(reason))
        console.print(table)


def _grouped(refused: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One line for all siblings that are refused for the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, reason in refused:
        groups.setdefault((path.rpartition(".")[0], reason), []).append(path)
    return [
        (f"{paths[0]} and {len(paths) - 1} beside it" if len(paths) > 1 else paths[0], reason)
        for (_, reason), paths in groups.items()
    ]


def show_result(result: "Result", folder: Any) -> None:
    """What one run did, what it measured, and where it lies."""
    console, facts = out(), result.facts
    console.print(f"Adaptation: {escape(facts['adapt']['note'])}")
    removed = [unit for unit in facts["units"] if unit["action"] != "keep"]
    table = _table("removed unit", "class", "action", "saves ms", "harm", right=("saves ms", "harm"), title="Plan")
    for unit in removed:
        harm = unit.get(f"harm_{unit['action']}", dict(unit.get("width_harms", [])).get(unit.get("kept")))
        table.add_row(
            escape(unit["id"]),
            escape(unit["module"]),
            f"{unit['kept']} of {unit['members']} stay" if unit.get("members") else unit["action"],
            ms(unit["saved_ms"]),
            "" if harm is None else f"{harm:.3g}",
        )
    if removed:
        console.print(table)
    console.print(f"{len(removed) or 'None'} of {len(facts['units'])} units removed or narrowed.")
    _show_latency(console, facts)
    _show_agreement(console, facts)
    _show_skipped(console, facts)
    show_seconds(facts["seconds"])
    console.print(f"Artifact: {escape(str(folder))} (report.html shows it)", soft_wrap=True)


def show_adapted(found: "Result", folder: object) -> None:
    """What was done to the model, how far its answers moved, and where the artifact lies."""
    console, facts = out(), found.facts
    console.print(f"Adaptation: {escape(facts['adapt']['note'])}")
    table = _table("", "value", title="What was found")
    for name, value in facts["adapt"]["facts"].items():
        table.add_row(escape(name.replace("_", " ")), f"{value:.4g}")
    if facts["adapt"]["facts"]:
        console.print(table)
    if facts["agreement"] is not None:
        n = facts["agreement"]["n_samples"]
        alike = percent(facts["agreement"])
        console.print(f"Agreement with the original: {alike} on {n} held-out samples (not accuracy)")
    _show_skipped(console, facts)
    show_seconds(facts["seconds"])
    console.print(f"Artifact: {escape(str(folder))} (evaluate it with labels, or compress it)", soft_wrap=True)


def show_exits(found: "Result", folder: object) -> None:
    """Where samples leave, how fast that is, how far the answers are the model's, and where the artifact lies."""
    console, facts = out(), found.facts
    exits = facts["early_exit"]
    numbers = ("samples", "leaves from", "ms", "agreement", "temperature", "calibration error")
    table = _table("exit behind", *numbers, right=numbers, title="Exits")
    for row in exits["exits"]:
        table.add_row(
            escape(row["path"]), f"{row['share']:.1%}", f"{row['threshold']:.4g}", ms(row["ms"]),
            f"{row['agreement']:.1%}",
            f"{row['temperature']:.3g}", f"{row['calibration_error_before']:.3f} -> {row['calibration_error']:.3f}",
        )  # fmt: skip
    table.add_row("the end", f"{exits['end']['share']:.1%}", "", ms(exits["end"]["ms"]), "", "", "")
    console.print(table)
    when = f"{exits['threshold']:.4g}" if exits["threshold"] <= 1 else "above 1: none leaves early"
    console.print(f"{escape(exits['note'][:1].upper() + exits['note'][1:])}. Threshold: {when}")
    _show_latency(console, facts)
    _show_agreement(console, facts)
    _show_skipped(console, facts)
    show_seconds(facts["seconds"])
    console.print(f"Artifact: {escape(str(folder))} (report.html shows it)", soft_wrap=True)


def _show_skipped(console: Console, facts: Mapping[str, Any]) -> None:
    skipped = facts["samples"]["skipped"]
    for name, reason in skipped[:MAX_LISTED]:
        console.print(f"Skipped sample {escape(str(name))}: {escape(str(reason))}")
    if len(skipped) > MAX_LISTED:
        console.print(f"... and {len(skipped) - MAX_LISTED} more; report.json has them all.")


def _show_latency(console: Console, facts: Mapping[str, Any]) -> None:
    latency, target, size = facts["latency"], facts["target"], facts["machine"]["batch_size"]
    speedup = latency["speedup"]
    table = _table("", "ms per batch", title=f"Latency, batches of {size}")
    table.add_row("original, measured", spread(latency["original"]))
    if "lossless" in latency:
        faster = f"{latency['lossless_speedup']:.2f}x"
        table.add_row(f"{escape(facts['lossless'])}: same answers", f"{spread(latency['lossless'])}, {faster}")
    table.add_row("compressed, predicted", f"{ms(latency['predicted_ms'])} ms")
    table.add_row("compressed, measured", spread(latency["compressed"]))
    table.add_row("speedup, measured", f"{speedup['median']:.2f}x ({speedup['low']:.2f}x to {speedup['high']:.2f}x)")
    console.print(table)
    verdict = "[green]met[/green]" if target["met"] else "[red]missed[/red]"
    note = " within the spread" if target["within_spread"] else ""
    console.print(f"Target {escape(target['asked'])}: {verdict}{note}")
    if latency.get("noise"):
        console.print(f"[yellow]{escape(latency['noise'])}[/yellow]")


def _show_agreement(console: Console, facts: Mapping[str, Any]) -> None:
    if facts["agreement"] is None:
        console.print("Agreement with the teacher: not measured, no samples were held out.")
        return
    n = facts["agreement"]["n_samples"]
    before = facts.get("agreement_repaired")
    told = f"; before distillation {before['share']:.1%}" if before else ""
    held = f"{n} held-out {facts.get('each', 'sample')}s"
    console.print(f"Agreement: {percent(facts['agreement'])} on {held}{told} ({NOT_ACCURACY})")
    task = facts.get("task")
    if task is not None and task["name"] != "classification":
        console.print(f"Task: {escape(task['name'])}; agreement means {escape(task['same'])}.")


def show_seconds(seconds: Mapping[str, float]) -> None:
    """One line: seconds of each stage and their sum."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    out().print(f"Seconds: {escape(parts)}; {sum(seconds.values()):.1f} in all")


def show_preview(found: "Preview") -> None:
    """The plans and the front of a dry run."""
    console, ready = out(), found.ready
    console.print(f"Adaptation: {escape(ready.adapt_note)}")
    for planned in found.plans:
        plan = planned.plan
        table = _table("would remove", "class", "action", title=f"Plan for {planned.target}")
        for removal in plan.removals:
            unit, action = removal.unit, str(removal.action)
            if isinstance(unit, WidthUnit):
                action = f"keep {len(removal.kept)} of {unit.n_members}"
            table.add_row(escape(unit.id), escape(unit.module), action)
        console.print(table)
        tried = [attempt.measured_ms for attempt in planned.attempts]
        nearest = min(tried, key=lambda value: abs(value - plan.budget_ms), default=None)
        console.print(
            f"{len(plan.removals)} of {len(ready.found.units)} units; {ms(plan.original_ms)} ms now, predicted "
            f"{ms(plan.predicted_ms)} ms" + ("" if nearest is None else f", measured on the cut model {ms(nearest)} ms")
        )
    columns = ("share of latency", "predicted ms", "predicted harm", "units removed")
    table = _table(*columns, title="What could be reached")
    for row in found.plans[0].front:
        table.add_row(f"{row['target']:g}x", ms(row["predicted_ms"]), f"{row['harm']:.3g}", f"{row['n_removed']:g}")
    if table.row_count:
        console.print(table)
    show_seconds(found.seconds)
    console.print("Dry run: nothing was written.")


def show_evaluation(found: "Evaluation") -> None:
    """Accuracy, calibration and agreement, with intervals."""
    console = out()
    columns = ["model", *(["against"] if found.against else [])]
    rows = [found.model, *([found.against] if found.against else [])]
    table = _table("", *columns)
    if found.model.accuracy is not None:
        table.add_row("accuracy", *(percent(row.accuracy) for row in rows))
        table.add_row("calibration error", *(f"{row.calibration_error:.3f}" for row in rows))
    if found.each == "token" and found.model.loss is not None:
        table.add_row("nats per token", *(f"{row.loss:.4f}" for row in rows))
    if found.model.confidence is not None:
        table.add_row("mean confidence", *(f"{row.confidence or 0.0:.1%}" for row in rows))
    console.print(table)
    if found.agreement is not None:
        console.print(f"Agreement between them: {percent(found.agreement)} (not accuracy)")
        if found.task != "classification":
            console.print(f"Task: {escape(found.task)}.")
    console.print(f"{found.n_samples} {found.each}s; intervals are 95 % Wilson.")
    if found.n_left_out:
        console.print(f"{found.n_left_out} samples left out: compression had used them.")
    if found.n_skipped:
        console.print(f"{found.n_skipped} samples skipped: they cannot be used.")
    for what, n in found.notes:
        console.print(f"{n} samples: {escape(what)}.")


def show_bench(rows: "Sequence[BenchRow]", machine: Mapping[str, Any]) -> None:
    """One line per batch size."""
    show_machine(machine)
    table = _table("batch", "original", "compressed", "speedup", right=("batch",))
    for row in rows:
        ratio = row.speedup
        faster = f"{ratio.median_ms:.2f}x ({ratio.low_ms:.2f}x to {ratio.high_ms:.2f}x)"
        table.add_row(str(row.batch_size), spread(row.original), spread(row.compressed), faster)
    out().print(table)
    out().print("Median and quartiles of interleaved rounds.")


def show_methods(rows: Sequence[Mapping[str, str]]) -> None:
    """Every method of every verb."""
    table = _table("verb", "name", "what", "needs", "source")
    last = ""
    for row in rows:
        if last and row["verb"] != last:
            table.add_section()
        last = row["verb"]
        table.add_row(*(escape(row[key]) for key in ("verb", "name", "what", "needs", "source")))
    out().print(table)


def show_demo(found: "DemoOutcome") -> None:
    """The demo's table: original against compressed."""
    console, facts = out(), found.result.facts
    shifted, clean = found.shifted, found.clean
    assert shifted.against is not None
    assert clean.against is not None
    show_machine(facts["machine"])
    console.print(f"Place of use: digits with {escape(found.corruption)}; the original never saw them.")
    console.print(f"Adaptation: {escape(facts['adapt']['note'])}")
    table = _table("", "original", "compressed")
    name = f"accuracy, {shifted.n_samples} held-out shifted digits"
    table.add_row(name, percent(shifted.against.accuracy), percent(shifted.model.accuracy))
    name = f"accuracy, {clean.n_samples} held-out clean digits"
    table.add_row(name, percent(clean.against.accuracy), percent(clean.model.accuracy))
    table.add_row("agreement with the original", "", percent(shifted.agreement))
    table.add_row("agreement with the adapted original", "", percent(facts["agreement"]))
    latency, speedup = facts["latency"], facts["latency"]["speedup"]
    size = facts["machine"]["batch_size"]
    table.add_row(f"latency per batch of {size}", spread(latency["original"]), spread(latency["compressed"]))
    faster = f"{speedup['median']:.2f}x ({speedup['low']:.2f}x to {speedup['high']:.2f}x)"
    table.add_row("speedup", "", faster)
    for title, key in (("parameters", "parameters"), ("MACs per sample", "macs")):
        table.add_row(title, count(facts["model"][key]), count(facts["student"][key]))
    console.print(table)
    show_seconds(facts["seconds"])
    console.print(f"Artifact: {escape(str(found.folder))} (open report.html there)", soft_wrap=True)
