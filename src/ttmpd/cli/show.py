"""What commands share of what they print: tables, lines, progress bars. What one command prints is in its file."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ttmpd.artifact import format
from ttmpd.artifact.sentences import circumstances, compared_with, runtime_sentence, task_sentence
from ttmpd.progress import watched

if TYPE_CHECKING:
    from ttmpd.artifact.run_report import RunReport
    from ttmpd.latency.device import Machine
    from ttmpd.latency.timing import Timing
    from ttmpd.quality.proportion import Proportion

SHOW_AFTER = 1.0
"""Seconds before a stage gets a bar."""
MAX_LISTED = 10

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


def spread(timing: "Timing") -> str:
    """Median and quartiles in milliseconds."""
    return format.spread(timing.median_ms, timing.low_ms, timing.high_ms, unit=" ms")


def interval(share: "Proportion | None") -> str:
    """A share with its interval; a dash where there is none."""
    return format.UNKNOWN if share is None else format.interval(share.share, share.low, share.high)


def new_table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table; the columns in ``right`` are aligned to the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def machine_line(machine: "Machine") -> str:
    """Device, threads and torch version."""
    return f"Device: {format.device(machine)}, torch {machine.torch}"


def show_machine(machine: "Machine") -> None:
    """What the milliseconds will belong to."""
    out().print(escape(machine_line(machine)))


# ------------------------------------------------------------------------------------------------------------ commands


def show_skipped(console: Console, report: "RunReport") -> None:
    """The samples that could not be used, and why."""
    skipped = report.samples.skipped
    for name, reason in skipped[:MAX_LISTED]:
        console.print(f"Skipped sample {escape(name)}: {escape(reason)}")
    if len(skipped) > MAX_LISTED:
        console.print(f"... and {len(skipped) - MAX_LISTED} more; report.json has them all.")


def show_latency(console: Console, report: "RunReport") -> None:
    """Milliseconds before and after, and whether the target is met."""
    latency = report.latency
    if latency is None:
        return
    table = new_table("", "ms per batch", title=f"Latency: {escape(circumstances(report))}")
    table.add_row("original, measured", spread(latency.original))
    if latency.lossless:
        faster = f"{spread(latency.lossless.timing)}, {format.times(latency.lossless.speedup)}"
        table.add_row(f"{escape(latency.lossless.changes)}: same predictions", faster)
    table.add_row("compressed, predicted", f"{format.milliseconds(latency.predicted_ms)} ms")
    table.add_row("compressed, measured", spread(latency.compressed))
    speedup = latency.speedup
    table.add_row("speedup, measured", format.speedup(speedup.median, speedup.low, speedup.high))
    console.print(table)
    if runtime_sentence(report):
        console.print(escape(runtime_sentence(report)))
    if report.target is not None:
        verdict = "[green]met[/green]" if report.target.met else "[red]missed[/red]"
        note = " within the spread" if report.target.within_spread else ""
        console.print(f"Target {escape(report.target.asked)}: {verdict}{note}")
    if latency.caution:
        console.print(f"[yellow]{escape(latency.caution)}[/yellow]")


def show_agreement(console: Console, report: "RunReport") -> None:
    """The share of held-out samples on which both models predict the same, and what that means."""
    console.print(escape(task_sentence(report)))
    if report.agreement is None:
        console.print(f"Agreement with {compared_with(report)}: not measured, no samples were held out.")
        return
    before = report.agreement_before
    earlier = f"; before distillation {format.percent(before.share)}" if before else ""
    held_out = format.plural(report.agreement.n, f"held-out {report.task.each}")
    shown = f"{interval(report.agreement)} on {held_out}{earlier}"
    console.print(f"Agreement with {compared_with(report)}: {shown} (this is not accuracy)")


def show_seconds(seconds: "Mapping[str, float]") -> None:
    """One line: seconds of each stage and their sum."""
    stages = ", ".join(f"{name} {format.seconds(value)}" for name, value in seconds.items())
    out().print(f"Seconds: {escape(stages)}; {format.seconds(sum(seconds.values()))} in all")
