"""What is out of reach is refused before anything is scored, and units promise no more than there is."""

import pytest
from torch import nn

from compress_cases import QUICK
from ttmpd.errors import BudgetUnreachableError
from ttmpd.latency.table import UnitLatency
from ttmpd.models.macs import count_macs
from ttmpd.pipeline import analysis, reach
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.inspect import preview
from ttmpd.pipeline.settings import Target
from ttmpd.score.magnitude import Magnitude

pytestmark = pytest.mark.usefixtures("operations_for_milliseconds")
FAST = QUICK | {"score": "magnitude", "adapt": "none"}


@pytest.fixture
def timed_cuts(monkeypatch):
    """How often a cut model was timed to see what is in reach."""
    removed = []
    honest = reach.measure_plan

    def counted(here, chosen, settings, **limits):
        removed.append(len(chosen))
        return honest(here, chosen, settings, **limits)

    monkeypatch.setattr(reach, "measure_plan", counted)
    return removed


@pytest.fixture
def overrated(monkeypatch):
    """Units that promise twenty times what they save, as on a busy machine."""
    honest = analysis.time_units

    def loud(*arguments, **settings):
        return tuple(latency.times(20.0) for latency in honest(*arguments, **settings))

    monkeypatch.setattr(analysis, "time_units", loud)


def floor_ms(model: nn.Module, samples) -> float:
    macs = count_macs(model, samples.batch(slice(0, 1)))
    return (macs[""] - macs["blocks"]) / 1e3


def test_what_is_out_of_reach_is_refused_before_anything_is_scored(model, samples, overrated, timed_cuts, monkeypatch):
    monkeypatch.setattr(Magnitude, "scores", lambda *_: pytest.fail("units were scored"))
    for run in (compress, lambda *a, speedup, **k: preview(*a, targets=[Target(speedup=speedup)], **k)):
        with pytest.raises(BudgetUnreachableError, match="ask for --speedup") as caught:
            run(model, samples, speedup=900.0, **FAST)
        assert caught.value.best_ms == pytest.approx(floor_ms(model, samples))
    assert len(timed_cuts) == 2


def test_units_promise_together_no_more_than_removing_all_of_them_saves(model, samples, overrated, timed_cuts):
    shown = preview(model, samples, targets=[Target(speedup=1.3), Target(macs=0.9)], **FAST)
    promised = sum(latency.ms for latency in shown.analysis.latencies)
    assert promised == pytest.approx(shown.analysis.lossless_ms - floor_ms(model, samples))
    assert all(attempt.predicted_ms > 0 for plan in shown.plans for attempt in plan.attempts)
    assert all(plan.plan.predicted_ms > 0 for plan in shown.plans)
    assert all(row["predicted_ms"] > 0 for plan in shown.plans for row in plan.pareto_front)
    assert len(timed_cuts) == 1  # one measurement serves all targets


def test_a_target_well_within_reach_costs_no_measurement(model, samples, timed_cuts, monkeypatch):
    honest = analysis.time_units
    monkeypatch.setattr(
        analysis,
        "time_units",
        lambda *a, **k: tuple(UnitLatency(t.unit, 0.9 * t.ms, t.replacements, t.widths) for t in honest(*a, **k)),
    )
    monkeypatch.setattr(reach, "PLAUSIBLE", 1.0)
    preview(model, samples, targets=[Target(speedup=1.1)], **FAST)
    assert timed_cuts == []


def test_where_units_save_nothing_the_model_is_measured_as_it_is(model, samples, monkeypatch):
    monkeypatch.setattr(
        analysis, "time_units", lambda _m, units, *_, **__: [UnitLatency(unit.id, 0.0, {}) for unit in units]
    )
    with pytest.raises(BudgetUnreachableError) as caught:
        compress(model, samples, speedup=2.0, **FAST)
    assert caught.value.best_ms == pytest.approx(count_macs(model, samples.batch(slice(0, 1)))[""] / 1e3)
