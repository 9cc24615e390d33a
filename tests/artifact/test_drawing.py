import dataclasses
import math

import pytest

from reports import small_report
from rich_report import rich
from ttmpd.artifact.drawing import (
    class_counts,
    confidence_counts,
    n_disagreements,
    pictures,
    scale,
    training_curves,
    unit_bars,
)
from ttmpd.artifact.measurements import HeldOut, Training, TrainingCheck


@pytest.mark.parametrize("values", [[], [5.0], [0.0, 0.0], [1e-7, 3e-7], [-2.0, 1e6], [None, 3.0], [math.nan, 3.0]])
@pytest.mark.parametrize("zero", [False, True])
def test_a_scale_holds_its_values(values: list[float | None], zero: bool) -> None:
    x = scale(values, 10, 110, zero=zero)
    assert all(10 <= x(value) <= 110 for value in values if value is not None and math.isfinite(value))
    assert 2 <= len(x.ticks) <= 12
    assert all(10 <= x(value) <= 110 for value, _ in x.ticks)


def test_curves_fit_their_steps() -> None:
    checks = (TrainingCheck(0, 0.5, 4.0), TrainingCheck(10, 0.6, math.nan), TrainingCheck(20, 0.7, 3.0))
    training = Training(20, "finished", False, 20, 0.0, (3.0, 2.0), checks)
    curves = training_curves(training)
    assert curves["training loss"] == [(10, 3.0), (20, 2.0)]
    assert curves["held-out loss"] == [(0, 4.0), (20, 3.0)]
    unchecked = training_curves(dataclasses.replace(training, checks=()))
    assert unchecked == {"training loss": [(10.0, 3.0), (20.0, 2.0)]}
    assert training_curves(None) == {}


def test_of_many_classes_those_that_change_most_are_shown() -> None:
    held_out = HeldOut(teacher=(*range(100), 7, 7, 7), student=(*range(100), 3, 3, 3))
    counts = class_counts(small_report(held_out=held_out))
    assert [row[0] for row in counts.rows[:2]] == ["class 7", "class 3"]
    assert (len(counts.rows), counts.n_hidden, counts.most) == (20, 80, 4)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    held_out = HeldOut(teacher_confidence=(0.0, 0.55, 1.0))
    assert confidence_counts(held_out) == {"teacher": [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]}


def test_bars_have_a_column_for_each_action_that_was_judged() -> None:
    report = rich()
    bars = unit_bars(report.units)
    assert bars.actions == ("drop", "linear", "narrow")
    assert bars.parts == ("damage", "repaired_damage")
    assert bars.most_ms == max(unit.ms for unit in report.units)
    assert unit_bars(()).actions == ()


def test_pictures_are_small_or_absent() -> None:
    report = rich()
    shown = pictures(report)
    assert len(shown) == len(report.disagreements) == n_disagreements(report)
    assert all(picture.is_small == bool(picture.png) for picture in shown)
    broken = dataclasses.replace(report.disagreements[0], png="no picture")
    assert pictures(small_report(disagreements=(broken,)))[0].png == ""
