"""Print measurements: terminal, page and model card show the same figure for the same one.

Whatever is None, NaN or infinite is not known, and shown as a dash.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help must not load PyTorch
    from ttmpd.latency.device import Machine

UNKNOWN = "–"


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """Three figures."""
    if value is None or not _is_known(value):
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """Three figures or more from one millisecond on, without the unit."""
    if value is None or not _is_known(value):
        return UNKNOWN
    return f"{value:,.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def seconds(value: float | None) -> str:
    """To a tenth of a second, without the unit."""
    return UNKNOWN if value is None or not _is_known(value) else f"{value:,.1f}"


def count(value: float | None) -> str:
    """Three figures with k, M, G or T."""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    fitting = (f"{value / size:.3g} {suffix}" for size, suffix in sizes if value and value >= size * 0.9995)
    return next(fitting, number(value))


def plural(n: int, noun: str) -> str:
    """A number of things, in words.

    Example:
        >>> plural(1, "thread"), plural(1024, "batch"), plural(0, "sample")
        ('1 thread', '1,024 batches', '0 samples')
    """
    ending = "" if n == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{n:,} {noun}{ending}"


def percent(share: float | None) -> str:
    """A share, to a tenth of a percent."""
    return UNKNOWN if share is None or not _is_known(share) else f"{100 * share:.1f} %"


def probability(value: float | None) -> str:
    """Four figures: what is close to 1 must not look like it."""
    return UNKNOWN if value is None or not _is_known(value) else f"{value:.4g}"


def interval(share: float | None, low: float | None, high: float | None) -> str:
    """A share with the interval in which it lies."""
    return f"{percent(share)} ({percent(low)} to {percent(high)})"


def spread(median: float | None, low: float | None, high: float | None, unit: str = "") -> str:
    """Median milliseconds with their quartiles; the median alone where a quartile is missing."""
    quartiles = "" if low is None or high is None else f" ({milliseconds(low)} to {milliseconds(high)})"
    return milliseconds(median) + unit + quartiles


def times(ratio: float | None) -> str:
    """How many times as fast, without quartiles."""
    return UNKNOWN if ratio is None or not _is_known(ratio) else f"{ratio:.2f}x"


def speedup(median: float, low: float, high: float) -> str:
    """How many times as fast, with quartiles."""
    return f"{times(median)} ({times(low)} to {times(high)})"


def change(before: float | None, after: float | None) -> str:
    """By how many percent a value grew or fell."""
    if not before or after is None:
        return UNKNOWN
    return "unchanged" if after == before else f"{100 * (after / before - 1):+.1f} %".replace("-", "−")


def device(machine: "Machine") -> str:
    """The device by name, with the threads of a processor.

    Example:
        >>> from ttmpd.latency.device import Machine
        >>> device(Machine("AMD EPYC", "cpu", 1, "2.14", "kept"))
        'AMD EPYC (cpu), 1 thread'
    """
    threads = f", {plural(machine.threads, 'thread')}" if machine.type == "cpu" else ""
    return f"{machine.device} ({machine.type}){threads}"
