"""What targets and runs share: the teacher's outputs, scores, and the stages of a run that was stopped."""

import dataclasses

import pytest
import torch

from compress_cases import QUICK, set_compare
from ttmpd.adapt.base import Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.distill.base import Distiller
from ttmpd.distill.one_time import OneTime
from ttmpd.latency.timing import Timings
from ttmpd.pipeline import analysis, run
from ttmpd.pipeline import compress as pipeline
from ttmpd.pipeline.compress import compress, compress_many
from ttmpd.pipeline.settings import Target
from ttmpd.plan.knapsack import Knapsack
from ttmpd.score.damage import Damage
from ttmpd.score.ttmpd import TTMPD

pytestmark = pytest.mark.usefixtures("operations_for_milliseconds")


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
    monkeypatch.setattr(run, "machine", lambda _device: dataclasses.replace(here, device="another"))
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
