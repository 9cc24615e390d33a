import dataclasses

import pytest
import torch
from torch import nn

from ttmpd.distill.base import FitContext
from ttmpd.distill.mimic import Mimic
from ttmpd.errors import UnsupportedError
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units


def test_the_teacher_runs_at_every_step_on_new_views(tmp_path):
    teacher, samples = tiny_model(), tiny_samples(12)
    student = Block().cut(teacher, tiny_units(teacher)[1:2])
    seen: list[torch.Tensor] = []
    method, context = Mimic(steps=5, batch_size=6), FitContext(folder=tmp_path, batch_size=5)
    targets = method.prepare(teacher, samples, samples, context)
    teacher.stem.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    method.fit(student, samples, samples, targets, context)
    assert [len(batch) for batch in seen] == [6] * 5
    assert len({row.numpy().tobytes() for batch in seen for row in batch}) == 30


def test_training_brings_the_last_map_closer(tmp_path):
    teacher, samples = tiny_model(), tiny_samples(24)
    student = Block().cut(teacher, tiny_units(teacher)[1:2])

    def gap() -> float:
        batch = samples.batch(slice(None))
        with torch.no_grad():
            maps = [net.eval().blocks(net.stem(batch)) for net in (student, teacher)]
        return float((maps[0] - maps[1]).square().mean())

    before = gap()
    method, context = Mimic(steps=60, batch_size=12, lr=0.05), FitContext(folder=tmp_path, batch_size=12)
    fit = method.fit(student, samples, samples, method.prepare(teacher, samples, samples, context), context)
    assert gap() < 0.8 * before
    assert (fit.steps, fit.checks) == (60, ())


def test_a_model_without_a_head_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Softmax(-1))
    with pytest.raises(UnsupportedError, match="head"):
        Mimic().prepare(model.eval(), tiny_samples(), tiny_samples(), FitContext(folder=tmp_path))


def test_targets_of_another_method_are_refused(tmp_path):
    teacher, samples, context = tiny_model(), tiny_samples(), FitContext(folder=tmp_path)
    targets = dataclasses.replace(Mimic().prepare(teacher, samples, samples, context), teacher=None)
    with pytest.raises(UnsupportedError, match="prepare"):
        Mimic(steps=1).fit(tiny_model(), samples, samples, targets, context)
