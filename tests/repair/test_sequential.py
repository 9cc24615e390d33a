"""Closed-form repair against cases that can be worked out by hand."""

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.models.modules import clone
from ttmpd.records import Folded, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.cut import build, replay
from ttmpd.surgery.replacements import replacement_at
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units

RNG = torch.Generator().manual_seed(0)


class LinearBlock(nn.Module):
    """x + A x + b: a residual block that a stand-in replaces exactly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.b(self.a(x))


class Chain(nn.Module):
    def __init__(self, n: int = 2, block=LinearBlock, width: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.body = nn.Sequential(*[block(width) for _ in range(n)])
        self.head = nn.Linear(width, 3, bias=bias)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class Reread(Chain):
    """The stand-in's output has two readers."""

    def forward(self, x):
        x = self.body(self.stem(x))
        return self.head(x) + x[:, :3]


class TanhBlock(LinearBlock):
    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


def chain(cls=Chain, **kwargs):
    torch.manual_seed(0)
    model = cls(**kwargs).eval()
    samples = Samples(torch.randn(80, 5), tuple(map(str, range(80))))
    units = Block().find(model, samples.batch(slice(0, 2))).units
    return model, samples, units


def answers(model, samples):
    with torch.no_grad():
        return model(samples.batch(slice(None)))


def test_blocks_that_are_linear_are_repaired_exactly():
    model, samples, units = chain()
    student = repaired(model, [Removal(u, "linear") for u in units], samples, ridge=0.0)
    assert [u.path for u in units] == ["body.0", "body.1"]
    assert isinstance(student.body[0], nn.Linear)
    assert torch.allclose(answers(student, samples), answers(model, samples), atol=1e-4)


def test_a_later_stand_in_makes_up_for_an_earlier_drop():
    model, samples, units = chain()
    student = repaired(model, [Removal(units[0], "drop"), Removal(units[1], "linear")], samples, ridge=0.0)
    assert isinstance(student.body[0], nn.Identity)
    assert torch.allclose(answers(student, samples), answers(model, samples), atol=1e-4)


def test_an_infinite_ridge_leaves_only_a_bias_of_a_drop():
    model, samples, units = chain()
    student = repaired(model, [Removal(units[0], "linear")], samples, ridge=1e9, refit_scope="removed_only")
    assert torch.allclose(student.body[0].weight, torch.eye(6), atol=1e-5)


@pytest.mark.parametrize("scope", ["removed_only", "all_later_layers"])
def test_the_batch_size_does_not_matter(scope):
    model, samples, units = tiny_model(), tiny_samples(40), tiny_units(tiny_model())
    removals = [Removal(units[0], "drop"), Removal(units[1], "linear")]
    one, other = (
        answers(repaired(model, removals, samples, batch_size=n, ridge=1e-2, refit_scope=scope), samples)
        for n in (7, 40)
    )
    assert torch.allclose(one, other, atol=1e-4)


def test_repair_is_closer_than_dropping():
    model, samples, units = tiny_model(), tiny_samples(40), tiny_units(tiny_model())
    wanted, gaps = answers(model, samples), {}
    for action in ("drop", "linear"):
        student = repaired(model, [Removal(u, action) for u in units[:2]], samples, refit_scope="removed_only")
        gaps[action] = float((answers(student, samples) - wanted).square().mean())
    assert gaps["linear"] < 0.5 * gaps["drop"]


def test_dropping_alone_takes_no_fit_where_what_lies_behind_stays():
    model, samples, units = tiny_model(), tiny_samples(), tiny_units(tiny_model())
    student = repaired(model, [Removal(units[1], "drop")], samples, refit_scope="removed_only")
    assert torch.equal(answers(student, samples), answers(Block().cut(model, units[1:2]), samples))


def test_the_teacher_stays_and_nothing_is_drawn():
    model, samples, units = chain()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    student = repaired(model.train(), [Removal(u, "linear") for u in units], samples)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not student.training
    assert torch.equal(state, torch.get_rng_state())


# --- replaying


def test_replay_gives_the_same_answers():
    model, samples, units = chain(n=3, block=TanhBlock, bias=False)
    removals = [Removal(units[0], "drop"), Removal(units[2], "linear")]
    student = repaired(model, removals, samples)
    again = replay(model, removals, clone(student).state_dict())
    assert torch.equal(answers(again, samples), answers(student, samples))
    assert isinstance(replacement_at(again, units[2]), nn.Linear)
    assert model.head.bias is None


def test_replay_builds_what_a_record_says_was_folded():
    model, samples, units = chain(n=2, block=TanhBlock, bias=False)
    removals, folded = [Removal(units[1], "linear")], Folded((units[1].path,), ("head",))
    student = build(model, removals, folded)
    torch.nn.init.ones_(student.head.bias)
    again = replay(model, removals, clone(student).state_dict(), folded=folded)
    assert torch.equal(answers(again, samples), answers(student, samples))
    assert isinstance(replacement_at(again, units[1]), nn.Identity)
    assert model.head.bias is None


def test_a_student_before_repair_answers_as_if_its_replacements_were_dropped():
    model, samples, units = chain(n=3, block=TanhBlock)
    linear, dropped = (build(model, [Removal(units[1], action)]) for action in ("linear", "drop"))
    assert torch.allclose(answers(linear, samples), answers(dropped, samples), atol=1e-6)
    assert not linear.training


def test_replay_refuses_weights_of_another_model():
    model, _samples, units = chain()
    with pytest.raises(RuntimeError, match="stem"):
        replay(model, [Removal(units[0], "drop")], {"head.weight": model.head.weight})
