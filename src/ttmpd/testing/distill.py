"""Checks of distillers."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.distill.base import Distiller, FitContext
from ttmpd.models.modules import clone
from ttmpd.models.taps import find_output_layer
from ttmpd.records import Removal
from ttmpd.surgery.cut import cut
from ttmpd.testing.common import equal, quick, twice
from ttmpd.testing.tiny_models import assert_untouched, require, tiny_model, tiny_samples, tiny_units
from ttmpd.training.held_out import held_out_check
from ttmpd.training.teacher_outputs import TeacherOutputs


def _student(teacher: nn.Module) -> nn.Module:
    return cut(teacher, [Removal(unit, "drop") for unit in tiny_units(teacher)[1:2]])


def _distilled(
    distiller: Distiller, teacher: nn.Module, student: nn.Module, n: int = 12, n_held: int = 6, **settings: Any
) -> tuple[Samples, TeacherOutputs, FitContext]:
    """Run both phases; ``student`` is trained in place."""
    method = quick(distiller).with_settings(**settings)
    samples, held_out = tiny_samples(n), tiny_samples(n_held, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(folder=Path(folder), batch_size=8, amp="off")
        targets = method.prepare(teacher, samples, held_out, context)
        method.fit(student, samples, held_out, targets, context)
    return held_out, targets, context


def check_distill_untouched(distiller: Distiller) -> None:
    """Teacher, samples and random state are left alone; of the student only values change."""
    teacher, samples = tiny_model(dropout=0.5), tiny_samples()
    student = _student(teacher)
    flags = [p.requires_grad for p in student.parameters()]
    method = quick(distiller)
    with tempfile.TemporaryDirectory() as folder, assert_untouched(teacher, samples):
        context = FitContext(folder=Path(folder), batch_size=8, amp="off")
        method.fit(student, samples, samples, method.prepare(teacher, samples, samples, context), context)
    require(flags == [p.requires_grad for p in student.parameters()], "requires_grad of the student must come back")
    require(not student.training, "the student must come back in eval mode")


def check_distill_repeats(distiller: Distiller) -> None:
    """The same seed gives the same weights, dropout or not."""

    def run() -> dict[str, Tensor]:
        teacher = tiny_model(dropout=0.5)
        student = _student(teacher)
        _distilled(distiller, teacher, student, n_held=0)
        return student.state_dict()

    require(equal(*twice(run)), "the same seed must give the same student")


def check_teacher_asked_once(distiller: Distiller) -> None:
    """Where ``one_time``, the teacher is not run after ``prepare``; otherwise it is."""
    teacher, samples, held_out = tiny_model(), tiny_samples(), tiny_samples(4, seed=2)
    student, method, calls = _student(teacher), quick(distiller), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(folder=Path(folder), batch_size=8, amp="off")
        targets = method.prepare(teacher, samples, held_out, context)
        handle = teacher.stem.register_forward_pre_hook(count)
        method.fit(student, samples, held_out, targets, context)
        handle.remove()
    once = type(distiller).one_time
    require((calls == 0) == once, f"one_time is {once}, but fit called the teacher {calls} times")
    require((targets.teacher is None) == once, "a method that is one_time must not keep the teacher, any other must")


def check_head_unchanged(distiller: Distiller) -> None:
    """The layer that gives the logits keeps its weights while others train."""
    teacher = tiny_model()
    student = _student(teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    head = find_output_layer(student, tiny_samples(2).batch(slice(None)))
    _distilled(distiller, teacher, student, n_held=0)
    after = student.state_dict()
    require(head == "head", f"the head of the checked model must be found, but got {head}")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    require(not any(name.startswith("head.") for name in changed), "the head must stay as it was")
    require("stem.0.weight" in changed, "the weights before the head must be trained")


def check_never_worse(distiller: Distiller) -> None:
    """Even a learning rate that ruins it leaves the student no worse on the held-out samples than before."""
    teacher = tiny_model()
    student = clone(teacher)
    next(student.parameters()).data.mul_(1.02)  # nearly as good as the teacher: there is much to lose
    start = clone(student)
    held_out, targets, _ = _distilled(distiller, teacher, student, lr=1e3)
    before = held_out_check(start, held_out, targets, 8)
    after = held_out_check(student, held_out, targets, 8)
    assert before is not None
    assert after is not None
    require(not before().better_than(after()), f"the student must not get worse, but went from {before()} to {after()}")


def check_distill_edges(distiller: Distiller) -> None:
    """A single sample with nothing held out works; no steps change nothing."""
    teacher = tiny_model()
    _distilled(distiller, teacher, _student(teacher), n=1, n_held=0)
    student = _student(teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    _distilled(distiller, teacher, student, steps=0)
    require(equal(student.state_dict(), before), "no steps must change nothing")


CHECKS = (
    check_distill_untouched,
    check_distill_repeats,
    check_teacher_asked_once,
    check_head_unchanged,
    check_never_worse,
    check_distill_edges,
)
