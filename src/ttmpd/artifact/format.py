"""One way to print milliseconds, counts and shares."""

_UNKNOWN = "–"


def _number(value: float | None) -> str:
    """Three figures."""
    return _UNKNOWN if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ms(value: float | None) -> str:
    digits = 0 if value is None else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return _UNKNOWN if value is None else f"{value:,.{digits}f}"


def _count(value: float | None) -> str:
    """Three figures with k, M, G or T."""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    fitting = (f"{value / size:.3g} {suffix}" for size, suffix in sizes if value and value >= size * 0.9995)
    return next(fitting, _number(value))


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{100 * share:.1f} %"
