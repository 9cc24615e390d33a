"""Text of the command line as durations, targets and methods."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ttmpd.errors import InvalidValueError

if TYPE_CHECKING:
    from ttmpd.pipeline.settings import Target


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


def parse_targets(
    *, speedup: float | None = None, latency: str | None = None, macs: str | None = None, targets: str | None = None
) -> "dict[str, Target]":
    """Targets by name; the name is the sub-folder when there are several."""
    from ttmpd.pipeline.settings import Target

    if targets is None:
        return {"": Target.of(speedup, latency, macs)}
    shares = parts_of(targets)
    if not shares or len(set(shares)) != len(shares):
        raise InvalidValueError(f"targets must be different latencies like 0.8x,0.5x, but got {targets!r}")
    return {share: Target.parse(share) for share in shares}


def parts_of(text: str) -> tuple[str, ...]:
    """The names in "block,head"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def choose_methods(names: dict[str, str], settings: Sequence[str], steps: int | None) -> dict[str, Any]:
    """A method per setting with its hyper-parameters.

    Args:
        names: the method's name per setting: of its file, or package.module:Class.
        settings: VERB.FIELD=VALUE each.
        steps: of the distiller, however long they take; None keeps its default.

    Raises:
        UnknownMethodError: no file bears a name.
        InvalidValueError: a setting has another form, verb or field.
    """
    from ttmpd.method import method_of

    given: dict[str, dict[str, str]] = {verb: {} for verb in names}
    for text in settings:
        key, equals, value = text.partition("=")
        verb, dot, field = key.strip().partition(".")
        if not (equals and dot and field) or verb not in given:
            known = ", ".join(given)
            raise InvalidValueError(f"a setting must be VERB.FIELD=VALUE with VERB one of {known}, but got {text!r}")
        given[verb][field] = value.strip()
    if steps is not None:
        limit = {"seconds": "0"} if hasattr(method_of("distill", names["distill"]), "seconds") else {}
        given["distill"] = limit | {"steps": str(steps)} | given["distill"]
    return {verb: method_of(verb, name).with_settings(**given[verb]) for verb, name in names.items()}
