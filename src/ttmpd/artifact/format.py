"""Print measurements: terminal, page and model card show the same figure for the same one."""

UNKNOWN = "–"


def number(value: float | None) -> str:
    """Three figures."""
    return UNKNOWN if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """Three figures or more from one millisecond on, without the unit."""
    digits = 0 if value is None else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """Three figures with k, M, G or T."""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    fitting = (f"{value / size:.3g} {suffix}" for size, suffix in sizes if value and value >= size * 0.9995)
    return next(fitting, number(value))


def percent(share: float | None) -> str:
    """A share, to a tenth of a percent."""
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def interval(share: float | None, low: float | None, high: float | None) -> str:
    """A share with the interval in which it lies."""
    return f"{percent(share)} ({percent(low)} to {percent(high)})"


def spread(median: float | None, low: float | None, high: float | None, unit: str = "") -> str:
    """Median milliseconds with their quartiles; the median alone where a quartile is missing."""
    quartiles = "" if low is None or high is None else f" ({milliseconds(low)} to {milliseconds(high)})"
    return milliseconds(median) + unit + quartiles


def times(ratio: float) -> str:
    """How many times as fast, without quartiles."""
    return f"{ratio:.2f}x"


def speedup(median: float, low: float, high: float) -> str:
    """How many times as fast, with quartiles."""
    return f"{times(median)} ({times(low)} to {times(high)})"
