"""What the page draws: scales, curves, bars and pictures, as numbers; the template puts them on paper."""

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ttmpd.artifact.measurements import Disagreement, ExitsReport, HeldOut, LatencyReport, Training, UnitReport
from ttmpd.artifact.run_report import RunReport

MAX_CLASSES, MAX_DOTS = 20, 400
SMALL = 100
"""Pixels of width below which a picture is drawn with hard edges."""

Point = tuple[float, float]

_PNG = re.compile(r"\AiVBORw0KGgo[A-Za-z0-9+/]{25,}={0,2}\Z")  # the signature and the width, in base64


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places on paper."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the scale, with their text."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        places = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(i * step, f"{round(i * step, 12):g}") for i in places]


def scale(values: Sequence[float | None], start: float, end: float, *, zero: bool = False) -> Scale:
    """A scale that holds all finite values with some air; ``zero``: and begins at zero."""
    finite = [value for value in values if value is not None and math.isfinite(value)] or [0.0, 1.0]
    low, high = (min(0.0, *finite) if zero else min(finite)), max(finite)
    air = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return Scale(low if zero else low - air, high + air, start, end)


def finite_points(points: Iterable[Point]) -> list[Point]:
    """The points that can be drawn."""
    return [point for point in points if all(map(math.isfinite, point))]


def thinned(rounds: Sequence[float]) -> Sequence[float]:
    """Evenly chosen rounds, no more than can be told apart."""
    return rounds[:: 1 + len(rounds) // MAX_DOTS]


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One of the two models in the drawing of all rounds; ``kind`` chooses its color."""

    kind: str
    median_ms: float
    low_ms: float
    high_ms: float
    rounds: Sequence[float]


def latency_rows(latency: LatencyReport) -> list[LatencyRow]:
    """Original and result."""
    models = (
        ("original", latency.original, latency.original_rounds),
        ("compressed", latency.compressed, latency.compressed_rounds),
    )
    return [
        LatencyRow(kind, timing.median_ms, timing.low_ms, timing.high_ms, thinned(rounds))
        for kind, timing, rounds in models
    ]


@dataclass(frozen=True, slots=True)
class UnitBars:
    """What the bars of all units are measured by, and which columns there are.

    Args:
        most_ms: longest bar of milliseconds.
        most_harm: longest bar of harm.
        actions: those of which a harm is known.
        parts: names of the quantities that harms were made of.
    """

    most_ms: float
    most_harm: float
    actions: tuple[str, ...]
    parts: tuple[str, ...]


def unit_bars(units: Sequence[UnitReport]) -> UnitBars:
    """Columns and lengths for a table of units."""
    actions = tuple(
        action for action in ("drop", "linear", "narrow") if any(unit.harm_of(action) is not None for unit in units)
    )
    harms = [unit.harm_of(action) or 0.0 for unit in units for action in actions]
    parts = tuple(dict.fromkeys(name for unit in units for name in unit.parts))
    return UnitBars(max((unit.ms for unit in units), default=0.0), max(harms, default=0.0), actions, parts)


def training_curves(training: Training | None) -> dict[str, list[Point]]:
    """Curves over the steps. The first check is before training, so it has no training loss."""
    if training is None:
        return {}
    checks, losses = training.checks, training.losses
    steps = [float(check.step) for check in checks[1:]]
    if len(steps) != len(losses):
        steps = [training.steps / max(1, len(losses)) * (place + 1) for place in range(len(losses))]
    curves = {
        "agreement": [(float(check.step), check.agreement) for check in checks],
        "held-out loss": [(float(check.step), check.loss) for check in checks],
        "training loss": list(zip(steps, losses, strict=True)),
    }
    return {name: points for name, curve in curves.items() if (points := finite_points(curve))}


def confidence_counts(held_out: HeldOut) -> dict[str, list[int]]:
    """How many held-out predictions fall into each tenth of confidence, by model."""
    values = {"teacher": held_out.teacher_confidence, "student": held_out.student_confidence}
    tenths = {name: Counter(min(9, int(10 * value)) for value in numbers) for name, numbers in values.items()}
    return {name: [counts[tenth] for tenth in range(10)] for name, counts in tenths.items() if counts}


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How often each class is predicted.

    Args:
        rows: (name, by the teacher, by the student), largest change first.
        n_hidden: classes with smaller changes.
        most: the largest count that is shown.
    """

    rows: tuple[tuple[str, int, int], ...]
    n_hidden: int
    most: int


def class_counts(report: RunReport) -> ClassCounts:
    """Predicted classes by how much their count changes."""
    teacher, student = Counter(report.held_out.teacher), Counter(report.held_out.student)
    changes = {index: abs(student[index] - teacher[index]) for index in {*teacher, *student}}
    order = sorted(changes, key=lambda index: (-changes[index], -teacher[index], index))
    rows = tuple((report.class_name(index), teacher[index], student[index]) for index in order[:MAX_CLASSES])
    most = max((max(row[1:]) for row in rows), default=0)
    return ClassCounts(rows, len(order) - len(rows), most)


@dataclass(frozen=True, slots=True)
class Picture:
    """A sample on which student and teacher differ; ``png`` is "" where there is no picture that can be trusted."""

    sample: Disagreement
    png: str
    is_small: bool


def pictures(report: RunReport) -> list[Picture]:
    """The samples on which the two differ; what is no base64 PNG is left out."""
    return [Picture(sample, png, _is_small(png)) for sample in report.disagreements for png in [_png(sample)]]


def _png(sample: Disagreement) -> str:
    return sample.png if _PNG.match(sample.png) else ""


def _is_small(png: str) -> bool:
    """Whether its width, which is in the header, is that of an icon."""
    return bool(png) and int.from_bytes(base64.b64decode(png[:32])[16:20]) < SMALL


def n_disagreements(report: RunReport) -> int:
    """On how many held-out samples the two differ, those that are not shown included."""
    pairs = zip(report.held_out.teacher, report.held_out.student, strict=False)
    return max(len(report.disagreements), sum(teacher != student for teacher, student in pairs))


def exit_points(exits: ExitsReport) -> list[Point]:
    """Agreement over mean milliseconds of all thresholds."""
    return sorted(set(finite_points((point.ms, point.agreement) for point in exits.curve)))
