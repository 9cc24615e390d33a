"""One-time targets: the teacher is asked as often as there are views, and its answers are what the student learns."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.data.views import fixed_view
from ttmpd.distill.base import FitContext
from ttmpd.distill.one_time import MIN_BATCH, OneTime
from ttmpd.errors import InvalidValueError
from ttmpd.models.batch_size import ActivationMemory
from ttmpd.models.modules import clone
from ttmpd.models.run import predictions_of
from ttmpd.models.taps import Tap
from ttmpd.surgery.units.block import Block
from ttmpd.tasks.classification import Classification
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units
from ttmpd.training.freeze import freeze_before, freeze_head
from ttmpd.training.held_out import held_out_check, mix_with_start
from ttmpd.training.loop import Check
from ttmpd.training.losses import (
    entropy,
    feature_loss,
    feature_variance,
    mutual_information,
    soft_label_loss,
)
from ttmpd.training.teacher_outputs import load_teacher_outputs, save_teacher_outputs


def work_in(folder, **settings) -> FitContext:
    return FitContext(folder=folder, batch_size=5, amp="off", **settings)


def passes(model: nn.Module) -> list[torch.Tensor]:
    """Grows by every batch that goes through the model."""
    seen: list[torch.Tensor] = []
    model.stem.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    return seen


@pytest.fixture
def case():
    teacher = tiny_model()
    student = Block().cut(teacher, tiny_units(teacher)[1:2])
    return teacher, student, tiny_samples(12), tiny_samples(9, seed=2)


@pytest.mark.parametrize("views", [1, 3])
def test_the_teacher_sees_each_view_of_each_sample_once(tmp_path, case, views):
    teacher, student, samples, held_out = case
    seen = passes(teacher)
    method, context = OneTime(steps=6, views=views, batch_size=6), FitContext(folder=tmp_path, batch_size=6, amp="off")
    targets = method.prepare(teacher, samples, held_out, context)
    # Batches of two look for the place of the features and for the size of a step; the rest are the teacher's answers.
    counted = Counter(row.numpy().tobytes() for batch in seen if len(batch) > 2 for row in batch)
    inputs, expected = samples.batch(slice(None)), Counter()
    for view in range(views):
        rows = fixed_view(inputs, torch.arange(12), view, 0, 12, method.smallest_crop)
        expected.update(row.numpy().tobytes() for row in rows)
    expected.update(row.numpy().tobytes() for row in held_out.batch(slice(None)))
    assert counted == expected
    assert sum(counted.values()) == views * 12 + 9
    assert sum(len(batch) == 2 for batch in seen) <= 4
    del seen[:]
    method.fit(student, samples, held_out, targets, context)
    assert seen == []


def test_views_that_no_step_would_see_are_not_asked_for(tmp_path, case):
    teacher, _, samples, held_out = case
    method = OneTime(steps=3, views=8, batch_size=6)  # 18 places for 12 samples: the second view is half used
    assert len(method.prepare(teacher, samples, held_out, work_in(tmp_path)).logits) == 2


@pytest.mark.parametrize(("agreement", "times"), [(1.0, 1), (0.8, 1), (0.7, 1.5), (0.6, 2), (0.0, 2)])
def test_a_student_that_lost_much_gets_more_views_and_steps(tmp_path, case, agreement, times):
    teacher, student, samples, held_out = case
    method = OneTime(steps=4, views=2, batch_size=12)
    context = FitContext(folder=tmp_path, batch_size=12, amp="off", agreement=agreement)
    targets = method.prepare(teacher, samples, held_out, context)
    assert len(targets.logits) == 2 * times
    assert method.fit(student, samples, held_out, targets, context).steps == 4 * times


def test_further_views_keep_within_the_disk(tmp_path, case, monkeypatch):
    teacher, _, samples, held_out = case
    monkeypatch.setattr("ttmpd.distill.one_time.STORE", 1)
    context = FitContext(folder=tmp_path, batch_size=12, amp="off", agreement=0.0)
    assert len(OneTime(steps=4, views=2, batch_size=12).prepare(teacher, samples, held_out, context).logits) == 2


def test_the_batch_shrinks_where_activations_take_much_memory(monkeypatch, tmp_path, case):
    teacher, _, samples, _ = case
    method, context = OneTime(batch_size=64), work_in(tmp_path)
    assert method._step_size(teacher, samples, context) == 64
    monkeypatch.setattr("ttmpd.models.batch_size.activation_limit", lambda _device: 1)
    assert method._step_size(teacher, samples, context) == 2 * MIN_BATCH  # it has batch statistics


def test_memory_that_was_measured_is_not_measured_again(monkeypatch, tmp_path, case):
    teacher, _, samples, _ = case
    monkeypatch.setattr("ttmpd.distill.one_time.measure_activations", lambda *_: pytest.fail("measured again"))
    context = work_in(tmp_path, memory=ActivationMemory(1.0, limit=20 * samples.inputs[0].numel()))
    assert OneTime(batch_size=64)._step_size(teacher, samples, context) == 20


def test_targets_are_the_teachers_answers_for_the_views(tmp_path, case):
    teacher, _, samples, held_out = case
    targets = OneTime(views=2).prepare(teacher, samples, held_out, work_in(tmp_path, seed=7))
    inputs = samples.batch(slice(None))
    assert targets.tap == Tap("blocks", "output")
    assert targets.logits.shape == (2, 12, 4)
    with torch.no_grad():
        for view in range(2):
            batch = fixed_view(inputs, torch.arange(12), view, 7, 12, 0.25)
            assert torch.allclose(targets.logits[view], teacher(batch), atol=1e-5)
            assert torch.allclose(targets.features[view].float(), teacher.blocks(teacher.stem(batch)), atol=1e-2)
        assert torch.allclose(targets.held_out, teacher(held_out.batch(slice(None))), atol=1e-5)
    assert targets.teacher is None


def test_targets_come_back_from_disk(tmp_path, case):
    teacher, _, samples, held_out = case
    assert load_teacher_outputs(tmp_path) is None
    targets = OneTime(views=2).prepare(teacher, samples, held_out, work_in(tmp_path))
    assert load_teacher_outputs(tmp_path) is None
    save_teacher_outputs(targets, tmp_path)
    again = load_teacher_outputs(tmp_path)
    for name in ("features", "logits", "held_out"):
        assert torch.equal(getattr(again, name), getattr(targets, name))
    assert (again.tap, again.feature_variance) == (targets.tap, targets.feature_variance)
    assert np.load(tmp_path / "features.npy", mmap_mode="r").dtype == np.float16


def test_large_features_keep_single_precision(tmp_path, case):
    teacher, _, samples, held_out = case
    teacher.blocks[2].norm2.weight.data.mul_(1e5)
    targets = OneTime(views=1).prepare(teacher, samples, held_out, work_in(tmp_path))
    assert targets.features.dtype == torch.float32
    assert bool(torch.isfinite(targets.features).all())


def test_rows_have_one_view_and_no_feature_map(tmp_path):
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    samples = Samples(torch.randn(9, 5), tuple("abcdefghi"))
    targets = OneTime(views=4).prepare(model, samples, samples, work_in(tmp_path))
    assert targets.logits.shape == (1, 9, 3)
    assert targets.tap == Tap("2", "input")


def test_training_brings_the_student_closer_to_the_teacher(tmp_path, case):
    teacher, student, samples, held_out = case
    method, context = OneTime(steps=60, views=2, batch_size=12, lr=0.05), work_in(tmp_path)
    targets = method.prepare(teacher, samples, held_out, context)
    check = held_out_check(student, held_out, targets, 8)
    before = check()
    fit = method.fit(student, samples, held_out, targets, context)
    after = check()
    assert after.better_than(before)
    assert fit.losses[-1] < 0.7 * fit.losses[0]
    assert not fit.rolled_back
    assert fit.checks[0] == (0, before.agreement, pytest.approx(before.loss, rel=1e-4))


def test_what_was_frozen_and_trained_before_is_so_again(tmp_path, case):
    teacher, student, samples, held_out = case
    student.stem.requires_grad_(False)
    before = clone(student)
    method, context = OneTime(steps=3, views=1, batch_size=6), work_in(tmp_path)
    method.fit(student, samples, held_out.subset([]), method.prepare(teacher, samples, held_out, context), context)
    assert torch.equal(student.stem[0].weight, before.stem[0].weight)
    assert not torch.equal(student.blocks[0].conv1.weight, before.blocks[0].conv1.weight)
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in before.parameters()]


@pytest.mark.parametrize("moving", [True, False])
def test_batch_statistics_move_only_when_they_shall(tmp_path, case, moving):
    teacher, student, samples, held_out = case
    method, context = OneTime(steps=3, views=1, batch_size=6, train_norm=moving), work_in(tmp_path)
    before = student.stem[1].running_mean.clone()
    method.fit(student, samples, held_out.subset([]), method.prepare(teacher, samples, held_out, context), context)
    assert torch.equal(student.stem[1].running_mean, before) != moving


def test_measuring_mixed_precision_moves_no_statistics(tmp_path, case, monkeypatch):
    teacher, student, samples, held_out = case
    monkeypatch.setattr("ttmpd.training.loop._native_bfloat16", lambda: True)
    method = OneTime(steps=2, views=1, batch_size=6)
    context = dataclasses.replace(work_in(tmp_path), amp="auto")
    targets = method.prepare(teacher, samples, held_out, context)
    twin = clone(student)
    fit = method.fit(student, samples, held_out, targets, context)
    start = held_out_check(twin, held_out, targets, 8)()
    assert fit.checks[0] == (0, pytest.approx(start.agreement), pytest.approx(start.loss, rel=1e-4))
    assert int(student.stem[1].num_batches_tracked) <= int(twin.stem[1].num_batches_tracked) + 2


def test_a_deadline_that_has_passed_ends_training(tmp_path, case):
    teacher, student, samples, held_out = case
    method, context = OneTime(steps=50, views=1, batch_size=6), work_in(tmp_path, deadline=0.0)
    fit = method.fit(student, samples, held_out, method.prepare(teacher, samples, held_out, context), context)
    assert (fit.steps, fit.stopped) == (1, "time budget")


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"views": 0}, {"batch_size": 1}, {"lr": -0.1}, {"temperature": 0.0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        OneTime(**wrong)


# --- the guard


def test_the_head_is_frozen_and_told(case):
    _, student, samples, _ = case
    frozen = freeze_head(student, samples.batch(slice(0, 2)))
    assert {id(p) for p in frozen} == {id(p) for p in student.head.parameters()}
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]


def test_what_runs_before_the_first_removed_unit_is_frozen(case):
    _, student, samples, _ = case
    first = tiny_units(tiny_model())[1].path
    frozen = freeze_before(student.train(), first, samples.batch(slice(0, 2)))
    names = {n.partition(".")[0] if n.startswith("stem") else n[:8] for n, p in student.named_parameters()
             if not p.requires_grad}  # fmt: skip
    assert names == {"stem", "blocks.0"}
    assert {id(p) for p in frozen} == {id(p) for p in student.parameters() if not p.requires_grad}
    assert not any(m.training for m in student.stem.modules() if isinstance(m, nn.BatchNorm2d))
    assert student.blocks[2].training


def test_frozen_layers_stay_the_teachers(tmp_path, case):
    teacher, student, samples, held_out = case
    method, context = OneTime(steps=6, batch_size=6), work_in(tmp_path, first=tiny_units(teacher)[1].path)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    targets = method.prepare(teacher, samples, held_out, context)
    method.fit(student, samples, held_out, targets, context)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith(("stem", "blocks.0", "head")) for name in changed)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_check_counts_equal_answers(case):
    teacher, _, _, held_out = case
    logits = predictions_of(teacher, held_out, 3)
    with torch.no_grad():
        assert torch.allclose(logits, teacher(held_out.batch(slice(None))), atol=1e-6)

    class Kept:
        held_out = logits.clone()

    assert held_out_check(teacher, held_out, Kept, 3)().agreement == 1.0
    assert held_out_check(teacher, held_out, Kept, 3)().loss == pytest.approx(0.0, abs=1e-6)
    for row in range(2):
        Kept.held_out[row] = -Kept.held_out[row] * 5
    assert held_out_check(teacher, held_out, Kept, 3)().agreement == pytest.approx(7 / 9)
    assert held_out_check(teacher, held_out.subset([]), Kept, 3) is None


# --- losses by hand


def test_losses_by_hand():
    assert float(feature_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), 2.5)) == pytest.approx(2.0)
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32)
    kl = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert float(soft_label_loss(student, teacher)) == pytest.approx(kl, abs=1e-6)
    assert float(soft_label_loss(student * 2, teacher * 2, 2.0)) == pytest.approx(4 * kl, abs=1e-6)
    assert float(soft_label_loss(teacher + 7, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_the_tempered_loss_counts_what_is_known_not_how_sure_it_is():
    tempered_loss = Classification().held_out_loss
    torch.manual_seed(0)
    teacher = 3 * torch.randn(40, 5)
    student = teacher + torch.randn(40, 5)
    assert tempered_loss(teacher / 2, teacher) == pytest.approx(0.0, abs=1e-6)
    assert tempered_loss(student / 2, teacher) == pytest.approx(tempered_loss(student, teacher))
    assert tempered_loss(student, teacher) < float(soft_label_loss(student / 2, teacher))
    assert tempered_loss(student, teacher) < 0.6 * tempered_loss(student[torch.randperm(40)], teacher)
    assert np.isnan(tempered_loss(torch.full((2, 3), float("nan")), torch.ones(2, 3)))


def test_a_student_that_knows_more_is_kept_though_it_is_surer_of_its_mistakes():
    """A closed-form repair draws logits together: by the plain loss it looks better than what training makes of it."""
    torch.manual_seed(0)
    held_out = Samples(torch.randn(75, 1), tuple(map(str, range(75))))

    class Kept:
        held_out = 4 * torch.randn(75, 10)

    start, later = Kept.held_out * 0.5 + torch.randn(75, 10), 3 * (Kept.held_out + torch.randn(75, 10))
    checks = [held_out_check(Answers(logits), held_out, Kept, 75)() for logits in (start, later)]
    assert float(soft_label_loss(start, Kept.held_out)) < float(soft_label_loss(later, Kept.held_out))
    assert checks[1].better_than(checks[0])


class Answers(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits[: len(x)]


def test_information_by_hand():
    sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert entropy(torch.zeros(3, 4)).tolist() == pytest.approx([np.log(4)] * 3)
    assert float(mutual_information(sure)) == pytest.approx(np.log(2), abs=1e-4)
    assert float(mutual_information(sure[[0, 0]])) == pytest.approx(0.0, abs=1e-4)
    assert float(mutual_information(torch.zeros(2, 2))) == pytest.approx(0.0, abs=1e-6)


def test_variance_by_hand():
    assert feature_variance(torch.tensor([[0.0, 5.0], [2.0, 5.0]])) == pytest.approx(0.5)
    assert feature_variance(torch.tensor([[3.0, 1.0]])) == pytest.approx(5.0)
    assert feature_variance(torch.ones(4, 2)) > 0


@pytest.mark.parametrize(("loss", "moved"), [(1.3, True), (1.4, False)])
def test_a_student_moves_back_to_its_start_unless_it_is_shown_to_be_worse_there(loss, moved):
    student, start = tiny_model(), {name: value.clone() for name, value in tiny_model(seed=1).state_dict().items()}
    before = {name: value.clone() for name, value in student.state_dict().items()}
    end, there = Check(0.5, 1.0, 98), Check(0.5, loss, 98)
    assert mix_with_start(student, start, 0.25, lambda: there, end) is moved
    for name, value in student.state_dict().items():
        if value.is_floating_point():
            wanted = 0.75 * before[name] + 0.25 * start[name] if moved else before[name]
            torch.testing.assert_close(value, wanted)
        else:
            assert torch.equal(value, before[name])


def test_what_is_kept_after_training_lies_between_its_end_and_its_start(tmp_path, case):
    teacher, student, samples, held_out = case
    start, ends = clone(student).state_dict(), {}
    for share in (0.0, 0.25):
        method, context = (
            OneTime(steps=6, views=1, batch_size=6, lr=1e-4, start_share=share),
            work_in(tmp_path / str(share)),
        )
        context.folder.mkdir()
        targets = method.prepare(teacher, samples, held_out, context)
        pupil = clone(student)
        fit = method.fit(pupil, samples, held_out, targets, context)
        assert (fit.best_step, fit.start_weight) == (6, share)
        ends[share] = pupil.state_dict()
    for name, value in ends[0.25].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * ends[0.0][name] + 0.25 * start[name])
