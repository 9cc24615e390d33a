"""What commands share of what they print: tables, lines, progress bars. What one command prints is in its file."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ttmpd.artifact import format
from ttmpd.progress import watched

if TYPE_CHECKING:
    from ttmpd.latency.timing import Timing

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


def spread(timing: "Timing | Mapping[str, Any]") -> str:
    """Median and quartiles in milliseconds."""
    median, low, high = _values(timing, "median_ms", "low_ms", "high_ms")
    return format.spread(median, low, high, unit=" ms")


def interval(measured: Any) -> str:
    """A share with its interval, from a record or plain data."""
    return format.interval(*_values(measured, "share", "low", "high"))


def _values(measured: Any, *names: str) -> Iterator[Any]:
    get = measured.__getitem__ if isinstance(measured, Mapping) else lambda name: getattr(measured, name)
    return map(get, names)


def new_table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table; the columns in ``right`` are aligned to the right."""
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


def show_skipped(console: Console, facts: Mapping[str, Any]) -> None:
    """The samples that could not be used, and why."""
    skipped = facts["samples"]["skipped"]
    for name, reason in skipped[:MAX_LISTED]:
        console.print(f"Skipped sample {escape(str(name))}: {escape(str(reason))}")
    if len(skipped) > MAX_LISTED:
        console.print(f"... and {len(skipped) - MAX_LISTED} more; report.json has them all.")


def show_latency(console: Console, facts: Mapping[str, Any]) -> None:
    """Milliseconds before and after, and whether the target is met."""
    latency, target, size = facts["latency"], facts["target"], facts["machine"]["batch_size"]
    speedup = latency["speedup"]
    table = new_table("", "ms per batch", title=f"Latency, batches of {size}")
    table.add_row("original, measured", spread(latency["original"]))
    if "lossless" in latency:
        faster = format.times(latency["lossless_speedup"])
        table.add_row(f"{escape(facts['lossless'])}: same answers", f"{spread(latency['lossless'])}, {faster}")
    table.add_row("compressed, predicted", f"{format.milliseconds(latency['predicted_ms'])} ms")
    table.add_row("compressed, measured", spread(latency["compressed"]))
    table.add_row("speedup, measured", format.speedup(**speedup))
    console.print(table)
    verdict = "[green]met[/green]" if target["met"] else "[red]missed[/red]"
    note = " within the spread" if target["within_spread"] else ""
    console.print(f"Target {escape(target['asked'])}: {verdict}{note}")
    if latency.get("noise"):
        console.print(f"[yellow]{escape(latency['noise'])}[/yellow]")


def show_agreement(console: Console, facts: Mapping[str, Any]) -> None:
    """The share of held-out samples on which student and teacher predict the same."""
    if facts["agreement"] is None:
        console.print("Agreement with the teacher: not measured, no samples were held out.")
        return
    n = facts["agreement"]["n"]
    before = facts.get("agreement_repaired")
    told = f"; before distillation {format.percent(before['share'])}" if before else ""
    held = f"{n} held-out {facts.get('each', 'sample')}s"
    console.print(f"Agreement: {interval(facts['agreement'])} on {held}{told} ({NOT_ACCURACY})")
    task = facts.get("task")
    if task is not None and task["name"] != "classification":
        console.print(f"Task: {escape(task['name'])}; agreement means {escape(task['same'])}.")


def show_seconds(seconds: Mapping[str, float]) -> None:
    """One line: seconds of each stage and their sum."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    out().print(f"Seconds: {escape(parts)}; {sum(seconds.values()):.1f} in all")
