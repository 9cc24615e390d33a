"""Closed-form repair against cases that can be worked out by hand."""

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.models.modules import clone
from ttmpd.quality.damage import skippable
from ttmpd.records import DepthUnit, Folded, Removal
from ttmpd.repair.linear import ReplacementFit
from ttmpd.repair.positions import choose_positions
from ttmpd.repair.sequential import repaired
from ttmpd.repair.unfold import rows
from ttmpd.surgery.cut import build, replay
from ttmpd.surgery.replacements import LinearMap, put, replacement_at
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units

RNG = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


def unit_of(shape=(5,), layout="channels_last", activation="") -> DepthUnit:
    return DepthUnit("block", "body.0", "B", shape, layout, 1, 1, activation)


def install(model: nn.Module, unit: DepthUnit, fit: LinearMap) -> None:
    module = Block().replacement(unit)
    linear = module[0] if isinstance(module, nn.Sequential) else module
    with torch.no_grad():
        linear.weight.copy_(fit.weight.view_as(linear.weight))
        linear.bias.copy_(fit.bias)
    put(model, unit, module)


def fitted(x, y, ridge=0.0, weight=None) -> LinearMap:
    equations = ReplacementFit(x.shape[1])
    equations.add(x, y, weight)
    return equations.solve(ridge)


# --- the least squares


def test_a_linear_map_is_recovered():
    weight, bias, x = rand(5, 5), rand(5), rand(40, 5)
    fit = fitted(x, x @ weight.T + bias)
    assert torch.allclose(fit.weight, weight, atol=1e-6)
    assert torch.allclose(fit.bias, bias, atol=1e-6)


def test_ridge_by_hand():
    # x = -1, 1 and y = 3x: the branch y - x = 2x; gram 2, penalty ridge x 2, so b = 4 / (2 + 2 ridge).
    x = torch.tensor([[-1.0], [1.0]])
    for ridge, b in [(0.0, 2.0), (1.0, 1.0), (3.0, 0.5)]:
        fit = fitted(x, 3 * x, ridge)
        assert float(fit.weight) == pytest.approx(1 + b, abs=1e-6)
        assert float(fit.bias) == pytest.approx(0.0, abs=1e-6)


def test_an_infinite_ridge_is_the_identity_with_the_bias_left_free():
    x = torch.tensor([[-1.0], [1.0]])
    fit = fitted(x, 3 * x + 5, ridge=1e12)
    assert float(fit.weight) == pytest.approx(1.0, abs=1e-6)
    assert float(fit.bias) == pytest.approx(5.0, abs=1e-6)


def test_weights_by_hand():
    # Constant inputs: only the bias is fitted, as the weighted mean of 0, 0, 6 with weights 1, 1, 2.
    x, y = torch.zeros(3, 1), torch.tensor([[0.0], [0.0], [6.0]])
    assert float(fitted(x, y).bias) == pytest.approx(2.0)
    assert float(fitted(x, y, weight=torch.tensor([1.0, 1.0, 2.0])).bias) == pytest.approx(3.0)


def test_weights_count_like_repeated_rows_and_zero_like_none():
    x, y, times = rand(6, 3), rand(6, 3), torch.tensor([1, 2, 0, 3, 1, 4])
    weighted = fitted(x, y, 0.01, times.float())
    repeated = fitted(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), 0.01)
    assert torch.allclose(weighted.weight, repeated.weight, atol=1e-6)
    assert torch.allclose(weighted.bias, repeated.bias, atol=1e-6)


def test_rows_in_chunks_equal_rows_at_once():
    x, y, weight = rand(50, 4), rand(50, 4), torch.rand(50, generator=RNG)
    chunks = ReplacementFit(4)
    for part in torch.arange(50).split(7):
        chunks.add(x[part], y[part], weight[part])
    whole = fitted(x, y, 1e-3, weight)
    found = chunks.solve(1e-3)
    assert torch.allclose(found.weight, whole.weight, atol=1e-6)
    assert torch.allclose(found.bias, whole.bias, atol=1e-6)


def test_the_solution_is_the_least_squares_one():
    x, y = rand(60, 4).double(), rand(60, 4).double()
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1)], 1), y).solution
    fit = fitted(x, y)
    assert torch.allclose(fit.weight.T.double(), wanted[:4], atol=1e-5)
    assert torch.allclose(fit.bias.double(), wanted[4], atol=1e-5)


def test_sums_are_exact_where_single_precision_is_not():
    # A large common offset: squares of 1e4 swallow differences of 1e-2 in float32.
    x = 1e4 + 1e-2 * torch.arange(2000).float()[:, None]
    fit = fitted(x, 3 * (x - 1e4))
    single = x.T @ x
    assert float(single) != float(x.double().T @ x.double())
    assert float(fit.weight) == pytest.approx(3.0, rel=1e-3)


def test_dead_and_doubled_channels_are_no_trouble():
    x = rand(30, 3)
    x[:, 1] = 0.0
    x[:, 2] = x[:, 0]
    y = 2 * x
    fit = fitted(x, y)
    assert bool(torch.isfinite(fit.weight).all())
    assert torch.allclose(x @ fit.weight.T + fit.bias, y, atol=1e-4)


def test_no_rows_give_the_identity():
    fit = ReplacementFit(3).solve(1e-3)
    assert torch.equal(fit.weight, torch.eye(3))
    assert torch.equal(fit.bias, torch.zeros(3))


# --- positions and layouts


def test_rows_are_the_same_in_either_layout():
    value, index = rand(2, 5, 3, 4), torch.tensor([0, 7, 11])
    first = rows(value, "channels_first", index)
    last = rows(value.permute(0, 2, 3, 1), "channels_last", index)
    assert torch.equal(first, last)
    assert torch.equal(first[1], value[0, :, 1, 3])
    assert first.shape == (6, 5)


def test_positions_are_drawn_without_repetition_and_by_seed():
    unit = unit_of((5, 20, 20), "channels_first")
    found = choose_positions(unit, seed=1)
    assert len(set(found.tolist())) == 64
    assert int(found.max()) < 400
    assert torch.equal(found, choose_positions(unit, seed=1))
    assert not torch.equal(found, choose_positions(unit, seed=2))
    assert choose_positions(unit_of((5,))).tolist() == [0]


@pytest.mark.parametrize(
    ("shape", "layout", "x"),
    [
        ((5, 3, 4), "channels_first", (2, 5, 3, 4)),
        ((5, 7), "channels_first", (2, 5, 7)),
        ((7, 5), "channels_last", (2, 7, 5)),
        ((3, 4, 5), "channels_last", (2, 3, 4, 5)),
        ((5,), "channels_last", (2, 5)),
    ],
)
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
def test_a_map_answers_like_the_stand_in_it_is_installed_as(shape, layout, x, activation):
    unit, fit, x = unit_of(shape, layout, activation), LinearMap(9 * rand(5, 5), rand(5)), rand(*x)
    model = nn.Module()
    model.body = nn.ModuleList([nn.Identity()])
    install(model, unit, fit)
    wanted = rows(x, unit.layout, torch.arange(x[0].numel() // 5)) @ fit.weight.T + fit.bias
    wanted = {"": wanted, "relu": wanted.relu(), "relu6": wanted.clamp(0, 6)}[activation]
    with torch.no_grad():
        for answer in (model.body[0](x), fit(unit, x)):
            assert answer.shape == x.shape
            assert torch.allclose(rows(answer, unit.layout, torch.arange(x[0].numel() // 5)), wanted, atol=1e-4)


# --- whole students


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


# --- skipping what comes before


def test_units_of_a_chain_can_be_skipped():
    model, samples, units = chain(n=3, block=TanhBlock)
    assert skippable(model, units, samples.batch(slice(0, 2))) == {u.id for u in units}


def test_a_unit_beside_a_long_shortcut_cannot():
    class Around(Chain):
        def forward(self, x):
            first = self.body[0](self.stem(x))
            return self.head(self.body[1](first) + first)

    model, samples, units = chain(Around, block=TanhBlock)
    assert len(units) == 2
    assert skippable(model, units, samples.batch(slice(0, 2))) == {units[0].id}
