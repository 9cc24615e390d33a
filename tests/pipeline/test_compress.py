"""The flow from model and samples to a result, with latency taken from operations instead of a clock."""

import json
import math

import pytest
import torch
from torch import nn

from compress_cases import QUICK
from ttmpd.adapt.none import NoAdaptation
from ttmpd.adapt.norm import Norm
from ttmpd.adapt.tent import Tent
from ttmpd.artifact.read_report import read_report
from ttmpd.distill.mimic import Mimic
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import (
    BudgetUnreachableError,
    InvalidValueError,
    ModelError,
    SamplesError,
    UnknownMethodError,
    UnsupportedError,
)
from ttmpd.models import batch_size
from ttmpd.models.batch_size import stored_bytes
from ttmpd.models.macs import count_macs
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.pipeline import calibration
from ttmpd.pipeline import compress as pipeline
from ttmpd.pipeline.compress import compress, compress_many
from ttmpd.pipeline.settings import Settings, Target, settings_of
from ttmpd.plan.greedy import Greedy
from ttmpd.score.damage import Damage
from ttmpd.score.magnitude import Magnitude
from ttmpd.score.ttmpd import TTMPD
from ttmpd.select.base import Selector
from ttmpd.select.el2n import EL2N
from ttmpd.select.puma import PUMA
from ttmpd.select.random import Random
from ttmpd.testing.tiny_models import assert_untouched, tiny_samples

pytestmark = pytest.mark.usefixtures("operations_for_milliseconds")


@pytest.mark.parametrize("target", [{}, {"speedup": 2.0, "latency": "5ms"}, {"speedup": 2.0, "macs": 0.5}])
def test_exactly_one_target(model, samples, target):
    with pytest.raises(InvalidValueError, match="exactly one"):
        compress(model, samples, **target, **QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed": 2}, "speed"),
        ({"actions": ()}, "actions"),
        ({"actions": ("shrink",)}, "actions"),
        ({"amp": "perhaps"}, "amp"),
        ({"holdout": 0.95}, "holdout"),
        ({"batch_size": 0}, "batch_size"),
        ({"pool": 0}, "pool"),
        ({"device": "toaster"}, "device"),
    ],
)
def test_wrong_settings_are_refused(model, samples, settings, message):
    with pytest.raises(InvalidValueError, match=message):
        compress(model, samples, speedup=2.0, **(QUICK | settings))


def test_settings_are_plain_data():
    data = json.loads(json.dumps(Settings(time_budget=math.inf).to_dict(), allow_nan=False))
    assert data["score"] == TTMPD().to_dict() | {"name": "ttmpd"}
    assert data["time_budget"] is None


# --- the flow


@pytest.mark.parametrize("speedup", [1.3, 2.0, 5.0])
def test_the_result_meets_its_target(model, samples, speedup):
    result = compress(model, samples, speedup=speedup, **QUICK)
    batch = samples.batch(slice(0, 1))
    assert result.met
    assert count_macs(model, batch)[""] / count_macs(result.model, batch)[""] >= speedup
    assert result.plan.budget_ms == pytest.approx(result.plan.original_ms / speedup)
    assert len(result.plan.removals) >= 1
    assert not result.model.training
    assert result.model(batch).shape == (1, 4)
    assert sorted(result.sample_ids) == sorted(samples.ids)


def test_milliseconds_and_shares_mean_the_same(model, samples):
    total = count_macs(model, samples.batch(slice(0, 1)))[""] / 1e3
    plans = [compress(model, samples, latency=text, **QUICK).plan for text in (f"{total / 2}ms", "0.5x")]
    assert plans[0].actions == plans[1].actions
    assert plans[0].budget_ms == pytest.approx(total / 2)


def test_the_same_seed_gives_the_same_model_and_what_was_passed_in_stays(model, samples):
    with assert_untouched(model, samples):
        first = compress(model, samples, speedup=2.0, **QUICK)
        second = compress(model, samples, speedup=2.0, **QUICK)
    assert first.plan == second.plan
    assert all(torch.equal(v, second.model.state_dict()[k]) for k, v in first.model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in first.model.parameters()}
    assert not shared


def test_a_model_that_its_owner_froze_has_the_same_student(model, samples):
    free = compress(model, samples, speedup=2.0, **QUICK)
    frozen = compress(model.requires_grad_(False), samples, speedup=2.0, **QUICK)
    assert free.report.training.steps > 0
    assert frozen.plan == free.plan
    assert all(torch.equal(v, frozen.model.state_dict()[k]) for k, v in free.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_report_agrees_with_the_result_and_can_be_read_back(model, samples, tmp_path):
    result = compress(model, samples, speedup=2.0, command="ttmpd compress", output=tmp_path / "out", **QUICK)
    report = read_report(tmp_path / "out")
    assert report == result.report
    assert (report.kind, report.command) == ("compressed", "ttmpd compress")
    assert report.target.met is True
    assert report.samples.n_fit == 30
    assert report.samples.n_held_out == 10
    assert {unit.id: unit.action for unit in report.removed} == result.plan.actions
    saved = {unit.id: unit.saved_ms for unit in report.units if unit.saved_ms is not None}
    assert saved.keys() == result.plan.actions.keys()
    assert sum(saved.values()) == pytest.approx(result.plan.original_ms - result.plan.predicted_ms)
    assert report.student.parameters == sum(p.numel() for p in result.model.parameters())
    assert report.model.parameters == sum(p.numel() for p in model.parameters())
    assert report.latency.speedup.median >= 2.0
    assert report.agreement.n == 10
    assert len(report.held_out.student) == 10
    assert report.training.steps == 3


def test_a_report_without_held_out_samples_can_be_read_back_too(model, samples, tmp_path):
    settings = QUICK | {"holdout": 0.0, "adapt": Norm(weights=(0.5,))}
    result = compress(model, samples, speedup=2.0, output=tmp_path / "out", **settings)
    report = read_report(tmp_path / "out")
    assert report.agreement is None
    assert report.samples.n_held_out == 0
    assert report.units == result.report.units


def test_only_the_actions_that_are_allowed(model, samples):
    for action in ("drop", "linear"):
        result = compress(model, samples, speedup=2.0, **(QUICK | {"actions": (action,)}))
        assert set(result.plan.actions.values()) == {action}
    with pytest.raises(BudgetUnreachableError):
        compress(model, samples, speedup=2.0, **(QUICK | {"actions": ("linear",), "score": Damage()}))


def test_other_methods_of_each_verb(model, samples):
    chosen = {"score": Damage(), "plan": Greedy(), "adapt": NoAdaptation()}
    result = compress(model, samples, speedup=2.0, **(QUICK | chosen))
    assert result.met
    assert {verb: method.name for verb, method in result.report.methods.items()} == {
        "select": "random", "adapt": "none", "score": "damage", "plan": "greedy", "distill": "one_time",
        "runtime": "eager",
    }  # fmt: skip


# --- which samples


class Marked(Selector):
    """Chooses the samples whose first pixel is odd, and notes what it was given."""

    seen = None

    def choose(self, teacher, pool, n, labels, *, batch_size, seed):
        Marked.seen = (pool, n, labels, batch_size, seed, teacher.training)
        return [i for i in range(len(pool)) if pool.inputs[i, 0, 0, 0] % 2][:n]


def test_the_chosen_samples_are_fitted_on_and_held_out_ones_are_drawn_at_random(model):
    many = tiny_samples(200)
    result = compress(model, many, speedup=2.0, **(QUICK | {"select": Marked(), "pool": 150}))
    pool, n, labels, batch_size, seed, training = Marked.seen
    assert (len(pool), n, labels, batch_size, seed, training) == (140, 30, None, 64, 0, False)
    odd = {many.ids[i] for i in range(200) if many.inputs[i, 0, 0, 0] % 2}
    fitted, held_out = result.sample_ids[:30], result.sample_ids[30:]
    assert len(set(fitted)) == 30
    assert len(held_out) == 10
    assert set(fitted) <= odd & set(pool.ids)
    assert not set(held_out) & set(pool.ids)
    assert not set(held_out) <= odd
    assert result.report.samples.n_fit == 30
    assert result.report.methods["select"].name.endswith("test_compress:Marked")
    assert result.report.settings["pool"] == 150
    assert result.report.seconds["select"] > 0


def test_a_selector_that_looks_at_nothing_reads_no_more_than_it_needs(model, samples, monkeypatch, caplog):
    asked = []
    true = calibration.open_samples

    def open_samples(*arguments, **more):
        asked.append(more["num_samples"])
        return true(*arguments, **more)

    monkeypatch.setattr(calibration, "open_samples", open_samples)
    drawn = compress(model, samples, speedup=2.0, **(QUICK | {"select": Random()}))
    assert "select" not in drawn.report.seconds
    chosen = compress(model, samples, speedup=2.0, **(QUICK | {"select": EL2N()}))  # no more are there: all of them
    assert asked == [40, 5000]
    assert not caplog.records  # a pool that is not full is nothing to warn of
    assert drawn.sample_ids == chosen.sample_ids
    assert drawn.plan.actions == chosen.plan.actions
    assert "select" not in chosen.report.seconds


def test_a_selection_is_not_made_again_after_a_kill(model, tmp_path, monkeypatch):
    settings = QUICK | {"select": EL2N(), "pool": 100}
    whole = compress(model, tiny_samples(100), speedup=2.0, **settings)
    with monkeypatch.context() as broken:
        broken.setattr(OneTime, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(model, tiny_samples(100), speedup=2.0, output=tmp_path / "out", **settings)
    monkeypatch.setattr(EL2N, "choose", lambda *_a, **_k: pytest.fail("chosen again"))
    monkeypatch.setattr(pipeline.Result, "save", lambda *_: None)
    again = compress(model, tiny_samples(100), speedup=2.0, output=tmp_path / "out", resume=True, **settings)
    assert again.sample_ids == whole.sample_ids
    assert again.report.seconds["select"] > 0


def test_too_few_samples_leave_no_folder(model, tmp_path):
    with pytest.raises(SamplesError, match="at least 2"):
        compress(model, tiny_samples(1), speedup=2.0, output=tmp_path / "out", **(QUICK | {"select": EL2N()}))
    assert not (tmp_path / "out").exists()


def test_memory_is_measured_once_in_a_run(model, samples, monkeypatch):
    probed = []
    monkeypatch.setattr(batch_size, "stored_bytes", lambda loss: probed.append(1) or stored_bytes(loss))
    settings = QUICK | {"select": EL2N(), "pool": 40, "num_samples": 30}
    compress_many(model, samples, targets=[Target(speedup=1.5), Target(speedup=2.0)], **settings)
    assert len(probed) == 1


def test_the_teacher_predicts_the_held_out_samples_once(model, samples, monkeypatch):
    teachers, rows, honest = [], [], pipeline.rescored_path

    def path_of(made, *more):
        teachers.append(made.teacher)
        return honest(made, *more)

    def watched(net, part, *more):
        rows.extend([len(part)] if net is teachers[0] else [])
        return predictions_of(net, part, *more)

    monkeypatch.setattr(pipeline, "rescored_path", path_of)
    monkeypatch.setattr(pipeline, "predictions_of", watched)
    monkeypatch.setattr("ttmpd.distill.base.predictions_of", watched)
    compress_many(model, samples, targets=[Target(speedup=1.5), Target(speedup=2.0)], **QUICK)
    assert rows == [10]


def test_a_model_without_units(samples):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(UnsupportedError, match="block"):
        compress(model, samples, speedup=2.0, **QUICK)


def test_a_model_that_answers_with_nan(model, samples):
    model.head.weight.data[0, 0] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        compress(model, samples, speedup=2.0, **QUICK)


def test_a_model_that_answers_with_maps(samples):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).eval()
    with pytest.raises(ModelError, match=r"one row per sample.*--task segmentation"):
        compress(model, samples, speedup=2.0, **QUICK)


def test_too_few_samples(model, samples):
    with pytest.raises(SamplesError, match="at least 2"):
        compress(model, samples.subset([0]), speedup=2.0, **QUICK)


def test_two_samples_are_enough(model, samples):
    result = compress(model, samples.subset([0, 1]), speedup=2.0, **(QUICK | {"holdout": 0.0}))
    assert result.met
    assert bool(torch.isfinite(result.model(samples.batch(slice(0, 4)))).all())


def test_an_opened_model_keeps_its_names(model, samples):
    opened = OpenedModel(model, "package:factory", False, class_names=("a", "b", "c", "d"))
    result = compress(opened, samples, speedup=2.0, **QUICK)
    assert result.opened is opened
    assert result.report.class_names == ("a", "b", "c", "d")
    assert result.report.model.id == "package:factory"


def test_methods_may_be_given_by_name(model, samples):
    found = settings_of({"adapt": "tent", "score": "magnitude", "plan": "greedy", "distill": "mimic", "select": "puma",
                         "units": "block"})  # fmt: skip
    assert (found.adapt, found.score, found.plan) == (Tent(), Magnitude(), Greedy())
    assert (found.distill, found.select, found.units) == (Mimic(), PUMA(), ("block",))
    with pytest.raises(
        UnknownMethodError, match=r"adapt must be one of .*tent, or package.module:Class of your own, but got 'tend'"
    ):
        compress(model, samples, speedup=1.2, adapt="tend")
