"""Targets in milliseconds and multiply-adds: reached, missed or refused; what lossless changes leave to remove."""

import json
import math

import pytest
import torch
from torch import nn

from compress_cases import QUICK, set_compare
from ttmpd.adapt.none import NoAdaptation
from ttmpd.artifact.measurements import TargetReport
from ttmpd.artifact.read import load
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import (
    BudgetUnreachableError,
    InvalidValueError,
)
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings
from ttmpd.models.macs import count_macs
from ttmpd.models.run import predictions_of
from ttmpd.pipeline import analysis, planning
from ttmpd.pipeline import compress as pipeline
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.settings import Target
from ttmpd.records import Lossless
from ttmpd.score.damage import Damage
from ttmpd.surgery.lossless import applied, foldable

pytestmark = pytest.mark.usefixtures("operations_for_milliseconds")

FOLDED_IS_FASTER = 1.25


@pytest.fixture
def folding_pays(monkeypatch):
    """A network without batch norms is 1.25 times as fast as one with them."""

    def milliseconds(net, batch):
        folded = not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        return (count_macs(net, batch[:1])[""] / 1e3 / (FOLDED_IS_FASTER if folded else 1.0),) * 5

    def compare(original, student, batch, *, unpruned=None, **_):
        nets = {"original": original, "compressed": student} | ({"lossless": unpruned} if unpruned else {})
        return Timings({name: milliseconds(net, batch) for name, net in nets.items()})

    def find_lossless(net, batch, **_):
        how = Lossless(foldable(net, batch[:2]), channels_last=True)
        return how, Timings({"original": milliseconds(net, batch), "lossless": milliseconds(applied(net, how), batch)})

    set_compare(monkeypatch, compare)
    monkeypatch.setattr(analysis, "find_lossless", find_lossless)


# --- targets


@pytest.mark.parametrize(
    ("text", "budget"),
    [("12ms", 12.0), ("12 ms", 12.0), ("0.5x", 15.0), ("12", 12.0), (12, 12.0), (7.5, 7.5), (" 0.25X ", 7.5)],
)
def test_targets_are_parsed(text, budget):
    assert Target.parse(text).budget_ms(30.0) == pytest.approx(budget)


@pytest.mark.parametrize("text", ["", "fast", "1.5x", "1x", "0x", "-1ms", "0ms", "nan", "inf", "nanx", "12s", "0.5xms"])
def test_impossible_targets_are_refused(text):
    with pytest.raises(InvalidValueError, match=r"latency|share"):
        Target.parse(text)


@pytest.mark.parametrize("speedup", [1.0, 0.5, -2.0, math.nan, math.inf])
def test_impossible_speedups_are_refused(speedup):
    with pytest.raises(InvalidValueError, match="speedup"):
        Target(speedup=speedup)


# --- what goes wrong


def test_a_target_out_of_reach_says_what_is_in_reach(model, samples):
    with pytest.raises(BudgetUnreachableError, match="speedup") as caught:
        compress(model, samples, speedup=1000.0, **QUICK)
    macs = count_macs(model, samples.batch(slice(0, 1)))
    assert caught.value.best_ms == pytest.approx((macs[""] - macs["blocks"]) / 1e3)


def test_the_speedup_that_the_error_names_is_reached(model, samples):
    with pytest.raises(BudgetUnreachableError) as caught:
        compress(model, samples, speedup=1000.0, **QUICK)
    named = float(str(caught.value).split("--speedup ")[1].split()[0])
    assert compress(model, samples, speedup=named, **QUICK).met


def test_a_time_budget_that_is_used_up_still_gives_a_result(model, samples):
    settings = QUICK | {"distill": OneTime(steps=500, views=1, batch_size=8), "time_budget": 0.0}
    result = compress(model, samples, speedup=2.0, **settings)
    assert result.report.training.stopped == "time budget"
    assert result.report.training.steps == 1
    assert result.met


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_share_of_the_macs_is_counted(model, samples, share, tmp_path):
    result = compress(model, samples, macs=share, output=tmp_path / "out", **QUICK)
    batch = samples.batch(slice(0, 1))
    left = count_macs(result.model, batch)[""] / count_macs(model, batch)[""]
    assert share - 0.2 < left <= share * (1 + planning.TOLERANCE)
    assert result.met
    report = result.report
    target = report.target
    assert target == TargetReport(f"{share:g} of the MACs", True, False, budget_ms=None, harm=target.harm)
    assert report.attempts == ()  # no latency was asked for: none was measured on the way
    assert report.latency.predicted_ms == result.plan.predicted_ms < result.plan.original_ms
    assert f"The target, {share:g} of the MACs, is met" in (tmp_path / "out" / "report.html").read_text()


def test_a_share_of_the_macs_that_is_missed_says_so(model, samples, monkeypatch):
    counted = planning.count_units
    monkeypatch.setattr(planning, "MAX_PLANS", 1)
    monkeypatch.setattr(
        planning,
        "count_units",
        lambda units: tuple(UnitLatency(t.unit, 4 * t.ms, t.replacements) for t in counted(units)),
    )
    result = compress(model, samples, macs=0.5, **QUICK)
    assert not result.met
    assert result.report.target.met is False
    assert result.report.student.macs > 0.5 * result.report.model.macs


def test_a_share_of_the_macs_out_of_reach(model, samples):
    with pytest.raises(BudgetUnreachableError, match=r"0\.01 of the MACs is not.*remain; ask for more") as caught:
        compress(model, samples, macs=0.01, **QUICK)
    assert 0.01 < caught.value.best_ms < 1


def test_a_share_of_the_macs_may_be_written_as_on_the_command_line():
    assert Target.of(macs="0.7x") == Target.of(macs="0.7") == Target.of(macs=0.7) == Target(macs=0.7)
    with pytest.raises(InvalidValueError, match=r'macs must be like "0\.7x", but got \'half\''):
        Target.of(macs="half")
    with pytest.raises(InvalidValueError, match="speedup must be a number, but got '2x'"):
        Target.of(speedup="2x")


@pytest.mark.parametrize("macs", [0.0, 1.0, 1.5, -0.5, math.nan])
def test_impossible_shares_of_the_macs_are_refused(macs):
    with pytest.raises(InvalidValueError, match="between 0 and 1"):
        Target(macs=macs)


def test_units_that_save_less_than_they_promise_are_made_up_for(model, samples, monkeypatch):
    honest = analysis.time_units
    monkeypatch.setattr(
        analysis,
        "time_units",
        lambda *a, **k: tuple(UnitLatency(t.unit, 1.4 * t.ms, t.replacements) for t in honest(*a, **k)),
    )
    monkeypatch.setattr(pipeline, "within_reach", lambda here, *_: here)  # which would see that it is too much
    result = compress(model, samples, speedup=2.0, **(QUICK | {"actions": ("drop",)}))
    attempts = result.report.attempts
    assert attempts[0].measured_ms > result.plan.budget_ms
    assert attempts[-1].measured_ms <= result.plan.budget_ms
    assert result.met


def test_a_plan_that_never_fits_is_the_fastest_and_says_so(model, samples, monkeypatch):
    def slow(original, student, batch, **_):
        ms = count_macs(original, batch[:1])[""] / 1e3
        return Timings({"original": (ms,) * 5, "compressed": (ms * 0.9,) * 5})

    set_compare(monkeypatch, slow)
    monkeypatch.setattr(pipeline, "within_reach", lambda here, *_: here)  # which would refuse it
    result = compress(model, samples, speedup=2.0, **QUICK)
    assert not result.met
    assert result.report.target.met is False
    assert result.report.latency.speedup.median == pytest.approx(1 / 0.9)


# --- what is lossless


def test_where_lossless_is_enough_nothing_is_scored_or_removed(model, samples, folding_pays, tmp_path):
    class Forbidden(Damage):
        """Must not be asked."""

        def scores(self, job):
            raise AssertionError("scored for nothing")

    result = compress(
        model, samples, speedup=1.2, output=tmp_path / "o", **QUICK | {"score": Forbidden(), "adapt": NoAdaptation()}
    )
    assert not result.plan.removals
    assert result.met
    assert result.report.latency.speedup.median == result.report.latency.lossless.speedup == 1.25
    assert torch.allclose(predictions_of(result.model, samples, 16), predictions_of(model, samples, 16), atol=1e-4)
    assert json.loads((tmp_path / "o" / "plan.json").read_text())["lossless"]["folded"]


def test_what_lossless_leaves_is_removed_and_loads_again(model, samples, folding_pays, tmp_path):
    result = compress(model, samples, speedup=1.7, output=tmp_path / "o", **QUICK)
    assert result.plan.removals
    assert result.report.latency.speedup.median >= 1.7
    assert result.report.latency.lossless.speedup == 1.25
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())
    again = load(tmp_path / "o", model=model)
    assert torch.equal(predictions_of(again, samples, 16), predictions_of(result.model, samples, 16))


def test_a_target_that_the_measurement_of_lossless_misses_is_met_by_removal(model, samples, folding_pays, monkeypatch):
    true = analysis.find_lossless

    def hopeful(net, batch, **settings):
        how, rounds = true(net, batch, **settings)
        return how, Timings({**rounds.ms, "lossless": tuple(ms / 1.2 for ms in rounds.ms["lossless"])})

    monkeypatch.setattr(analysis, "find_lossless", hopeful)
    result = compress(model, samples, speedup=1.4, **QUICK)
    assert result.plan.removals
    assert result.report.latency.speedup.median >= 1.4
