"""The flow from model and samples to a result, with latency taken from operations instead of a clock."""

import json
import math

import pytest
import torch
from torch import nn

from ttmpd.adapt.base import Adapter
from ttmpd.adapt.none import NoAdaptation
from ttmpd.adapt.norm import Norm
from ttmpd.adapt.tent import Tent
from ttmpd.artifact.measurements import TargetReport
from ttmpd.artifact.read import load
from ttmpd.artifact.read_report import read_report
from ttmpd.distill.base import Distiller
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
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings
from ttmpd.models import batch_size
from ttmpd.models.batch_size import stored_bytes
from ttmpd.models.macs import count_macs
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.pipeline import analysis, calibration, planning, run
from ttmpd.pipeline import compress as pipeline
from ttmpd.pipeline.compress import compress, compress_many
from ttmpd.pipeline.settings import Settings, Target, settings_of
from ttmpd.plan.greedy import Greedy
from ttmpd.plan.knapsack import Knapsack
from ttmpd.records import UNCHANGED, Lossless
from ttmpd.score.damage import Damage
from ttmpd.score.magnitude import Magnitude
from ttmpd.score.ttmpd import TTMPD
from ttmpd.select.base import Selector
from ttmpd.select.el2n import EL2N
from ttmpd.select.puma import PUMA
from ttmpd.select.random import Random
from ttmpd.surgery.lossless import applied, foldable
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples

QUICK = {
    "distill": OneTime(steps=3, views=2, batch_size=8),
    "num_samples": 40,
    "holdout": 0.25,
    "batch_size": 8,
    "device": "cpu",
    "amp": "off",
}


@pytest.fixture(autouse=True)
def operations_for_milliseconds(monkeypatch):
    """A block takes a millisecond per thousand multiply-accumulates, and so does everything else."""

    def compare(original, student, batch, **_):
        ms = {
            name: (count_macs(m, batch[:1])[""] / 1e3,) * 5
            for name, m in (("original", original), ("compressed", student))
        }
        return Timings(ms)

    def time_units(_model, units, _batch, **_):
        return tuple(UnitLatency(u.id, u.macs / 1e3, {"linear": u.channels**2 * 64 / 1e3}) for u in units)

    set_compare(monkeypatch, compare)
    monkeypatch.setattr(analysis, "time_units", time_units)


def set_compare(monkeypatch, compare) -> None:
    for module in (pipeline, planning):
        monkeypatch.setattr(module, "compare", compare)

    def nothing_lossless(model, batch, **_):
        return UNCHANGED, Timings(dict.fromkeys(("original", "lossless"), compare(model, model, batch).ms["original"]))

    monkeypatch.setattr(analysis, "find_lossless", nothing_lossless)


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


@pytest.fixture
def model() -> nn.Module:
    return tiny_model(n_blocks=5)


@pytest.fixture
def samples():
    return tiny_samples(40)


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


class Watching(Distiller):
    """One-time distillation that counts what the teacher sees, and when."""

    counts = {"prepare": 0, "fit": 0, "probe": 0}  # noqa: RUF012
    inner = OneTime(steps=12, views=3, batch_size=8)

    def prepare(self, teacher, samples, held_out, work):
        def count(_module, args):
            Watching.counts["probe" if len(args[0]) == 2 else self.phase()] += len(args[0])

        Watching.now = "prepare"
        teacher.stem.register_forward_pre_hook(count)
        return self.inner.prepare(teacher, samples, held_out, work)

    def fit(self, student, samples, held_out, targets, work):
        Watching.now = "fit"
        fit = self.inner.fit(student, samples, held_out, targets, work)
        Watching.now = "after"
        return fit

    @staticmethod
    def phase() -> str:
        Watching.counts.setdefault(Watching.now, 0)
        return Watching.now


def test_the_teacher_sees_every_view_once_and_never_again(model, samples):
    samples = samples.subset(range(36))
    Watching.counts = {"prepare": 0, "fit": 0, "probe": 0}
    settings = QUICK | {"distill": Watching(), "holdout": 0.25, "batch_size": 9}
    compress(model, samples, speedup=2.0, **settings)
    # Its predictions on the held-out samples are those that the students were compared with before.
    assert Watching.counts == {"prepare": 27 * 3, "fit": 0, "probe": 6}


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


# --- many targets


class CountingScorer(Damage.__mro__[1]):  # type: ignore[misc]
    """Counts how often it is asked."""

    asked = 0

    def scores(self, job):
        CountingScorer.asked += 1
        return Damage().scores(job)


class CountingAdapter(Adapter):
    asked = 0

    def adapt(self, teacher, samples, *, batch_size=64, seed=0):
        CountingAdapter.asked += 1
        return Norm().adapt(teacher, samples, batch_size=batch_size, seed=seed)


def test_many_targets_share_adaptation_scores_and_targets(model, samples, monkeypatch):
    prepared = []
    original = OneTime.prepare

    def prepare(self, *args):
        prepared.append(1)
        return original(self, *args)

    monkeypatch.setattr(OneTime, "prepare", prepare)
    CountingScorer.asked = CountingAdapter.asked = 0
    settings = QUICK | {"score": CountingScorer(), "adapt": CountingAdapter()}
    targets = [Target(speedup=1.3), Target(speedup=2.0), Target(speedup=4.0)]
    results = compress_many(model, samples, targets=targets, **settings)
    shared = CountingScorer.asked
    assert (CountingAdapter.asked, len(prepared)) == (1, 1)
    compress_many(model, samples, targets=targets[-1:], **settings)
    assert CountingScorer.asked == 2 * shared  # the walk to the deepest target serves the others
    CountingScorer.asked = 0
    compress_many(model, samples, targets=targets, **settings | {"plan": Knapsack(step=1.0)})
    assert CountingScorer.asked == 1
    sizes = [sum(p.numel() for p in result.model.parameters()) for result in results]
    assert sizes == sorted(sizes, reverse=True)
    assert len({result.plan.predicted_ms for result in results}) == 3
    alone = compress(model, samples, speedup=2.0, **settings)
    assert alone.plan == results[1].plan
    assert all(torch.equal(v, alone.model.state_dict()[k]) for k, v in results[1].model.state_dict().items())


# --- going on after a kill


def test_a_killed_run_goes_on_where_it_was(model, samples, tmp_path, monkeypatch):
    whole = compress(model, samples, speedup=2.0, **QUICK)
    monkeypatch.setattr(OneTime, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(model, samples, speedup=2.0, output=tmp_path / "out", **QUICK)
    monkeypatch.undo()
    forbidden = lambda *_a, **_k: pytest.fail("computed again")  # noqa: E731
    monkeypatch.setattr(OneTime, "prepare", forbidden)
    monkeypatch.setattr(TTMPD, "score", forbidden)
    monkeypatch.setattr(Norm, "adapt", forbidden)
    monkeypatch.setattr(analysis, "time_units", forbidden)
    monkeypatch.setattr(pipeline, "make_plan", forbidden)
    monkeypatch.setattr(pipeline.Result, "save", lambda *_: None)
    set_compare(monkeypatch, lambda *_a, **_k: Timings({"original": (2.0,) * 3, "compressed": (1.0,) * 3}))
    result = compress(model, samples, speedup=2.0, output=tmp_path / "out", resume=True, **QUICK)
    assert result.plan.actions == whole.plan.actions
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in result.model.state_dict().items())
    assert not (tmp_path / "out" / ".work").exists()


def test_a_run_that_moved_to_another_machine_is_timed_anew(model, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(OneTime, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(model, samples, speedup=2.0, output=tmp_path / "out", **QUICK)
    monkeypatch.undo()
    timed, here = [], run.machine("cpu")
    measure = analysis.time_units
    monkeypatch.setattr(analysis, "time_units", lambda *a, **k: timed.append(1) or measure(*a, **k))
    monkeypatch.setattr(TTMPD, "score", lambda *_a, **_k: pytest.fail("computed again"))
    monkeypatch.setattr(run, "machine", lambda _device: here | {"device": "another"})
    monkeypatch.setattr(pipeline, "rescored_path", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(model, samples, speedup=2.0, output=tmp_path / "out", resume=True, **QUICK)
    assert timed == [1]


def test_another_target_in_the_same_folder_uses_nothing_of_the_old_student(model, samples, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(pipeline.Result, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            compress(model, samples, speedup=4.0, output=tmp_path / "out", **QUICK)
    monkeypatch.setattr(pipeline.Result, "save", lambda *_: None)
    wanted = compress(model, samples, speedup=1.3, **QUICK)
    result = compress(model, samples, speedup=1.3, output=tmp_path / "out", resume=True, **QUICK)
    assert result.plan.actions == wanted.plan.actions
    assert all(torch.equal(v, wanted.model.state_dict()[k]) for k, v in result.model.state_dict().items())


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


def test_methods_may_be_given_by_name(model, samples):
    found = settings_of({"adapt": "tent", "score": "magnitude", "plan": "greedy", "distill": "mimic", "select": "puma",
                         "units": "block"})  # fmt: skip
    assert (found.adapt, found.score, found.plan) == (Tent(), Magnitude(), Greedy())
    assert (found.distill, found.select, found.units) == (Mimic(), PUMA(), ("block",))
    with pytest.raises(
        UnknownMethodError, match=r"adapt must be one of .*tent, or package.module:Class of your own, but got 'tend'"
    ):
        compress(model, samples, speedup=1.2, adapt="tend")


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
