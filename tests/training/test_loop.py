"""The training loop: schedule, order, best state, deadline, resume."""

import math

import pytest
import torch
from torch import nn

from ttmpd.errors import InvalidValueError
from ttmpd.models.batch_size import stored_bytes
from ttmpd.models.modules import clone
from ttmpd.testing.tiny_models import tiny_model, tiny_samples
from ttmpd.training.loop import Check, Loop, Schedule, batch_order, choose_amp, train


class Point(nn.Module):
    """One weight that moves by the learning rate at every step when the loss is the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def loss(self, _step: int) -> torch.Tensor:
        return -self.weight * 1.0


def plain(steps: int, **settings) -> Schedule:
    return Schedule(steps=steps, lr=1.0, weight_decay=0.0, **settings)


def scripted(*values: float):
    """A check on a great many samples that answers with the given agreements in turn, at a loss of one."""
    left = list(values)
    return lambda: Check(left.pop(0), 1.0, 10**6)


# --- the schedule


def test_one_cycle_by_hand():
    schedule = Schedule(steps=10, lr=4.0)
    rates = [schedule.lr_at(step) for step in range(10)]
    assert rates[:3] == [2.0, 4.0, 4.0]  # up over the first fifth, then a cosine over the other eight
    assert rates[4] == pytest.approx(2.0 * (1 + math.cos(math.pi * 2 / 8)))
    assert rates[6] == pytest.approx(2.0)
    assert rates[9] == pytest.approx(2.0 * (1 + math.cos(math.pi * 7 / 8)))
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_thirds_by_hand():
    schedule = Schedule(steps=10, lr=1.0, shape="thirds")
    rates = [schedule.lr_at(step) for step in range(10)]
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)


def test_a_schedule_of_one_step_has_a_rate():
    assert Schedule(steps=1, lr=3.0).lr_at(0) == 3.0
    assert Schedule(steps=0, lr=3.0).lr_at(0) == 3.0


@pytest.mark.parametrize("wrong", [{"steps": -1, "lr": 1.0}, {"steps": 1, "lr": -1.0}, {"steps": 1, "lr": math.nan}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(InvalidValueError):
        Schedule(**wrong)


def test_the_optimizer_follows_the_schedule():
    model = Point()
    train(model, model.loss, Schedule(steps=2, lr=1.0, weight_decay=0.0), Loop())
    # Rates 1 and 1 (half a cosine from its top); momentum 0.9: steps of 1, then 1.9.
    assert float(model.weight.detach()) == pytest.approx(2.9)


def test_clipping_bounds_a_step():
    model = Point()
    train(model, lambda step: 100 * model.loss(step), plain(1, clip=0.5), Loop())
    assert float(model.weight.detach()) == pytest.approx(0.5, rel=1e-4)


# --- the order of samples


@pytest.mark.parametrize(("n", "size"), [(12, 4), (12, 12), (5, 8), (1, 64), (7, 1)])
def test_an_epoch_covers_every_sample_once(n, size):
    steps = max(1, n // size)
    for epoch in range(3):
        index = torch.cat([batch_order(n, size, epoch * steps + i, seed=3) for i in range(steps)])
        assert sorted(index.tolist()) == list(range(n))


def test_a_partial_batch_is_left_out_and_its_samples_come_again():
    seen = [batch_order(10, 4, step, seed=0) for step in range(20)]
    assert all(len(set(index.tolist())) == 4 for index in seen)
    assert set(torch.cat(seen).tolist()) == set(range(10))


def test_epochs_and_seeds_are_ordered_differently():
    first, second = batch_order(50, 50, 0, seed=0), batch_order(50, 50, 1, seed=0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, batch_order(50, 50, 0, seed=1))
    assert torch.equal(first, batch_order(50, 50, 0, seed=0))


# --- the best state


def test_the_best_state_is_kept():
    model = Point()
    fit = train(model, model.loss, plain(4), Loop(check=scripted(0.1, 0.5, 0.9, 0.7, 0.8), check_every=1))
    assert (fit.steps, fit.best_step, fit.rolled_back, fit.stopped) == (4, 2, False, "finished")
    assert [(step, share) for step, share, _ in fit.checks] == [(0, 0.1), (1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8)]
    twin = Point()
    train(twin, twin.loss, plain(4), Loop(check=scripted(0.1, 0.5, 0.9, 0.0, 0.0), check_every=1))
    assert float(model.weight.detach()) == float(twin.weight.detach()) != 0.0


def test_a_start_that_is_shown_to_be_better_is_restored():
    model = Point()
    fit = train(model, model.loss, plain(3), Loop(check=scripted(0.9, 0.5, 0.8, 0.7), check_every=1))
    assert fit.rolled_back
    assert fit.best_step == 0
    assert float(model.weight.detach()) == 0.0


@pytest.mark.parametrize(("end", "kept"), [(1.3, 2), (1.4, 0)])
def test_a_start_whose_loss_is_a_little_lower_gives_way_to_the_end(end, kept):
    # Shown is a quarter: 1 is not less than 0.75 x 1.3, but less than 0.75 x 1.4.
    model, checks = Point(), [Check(0.5, 1.0, 98), Check(0.5, 3.0, 98), Check(0.5, end, 98)]
    fit = train(model, model.loss, plain(2), Loop(check=lambda: checks.pop(0), check_every=1))
    assert (fit.best_step, fit.rolled_back) == (kept, kept == 0)


def test_agreement_counts_beyond_a_standard_error_and_loss_within():
    # Of 98 samples half agree: a standard error is sqrt(0.5 x 0.5 / 98) = 0.0505.
    few = Check(0.5, 2.0, 98)
    assert Check(0.61, 9.0, 98).better_than(few)
    assert not Check(0.59, 9.0, 98).better_than(few)
    assert Check(0.41, 1.0, 98).better_than(few)
    assert not Check(0.39, 1.0, 98).better_than(few)
    assert not few.better_than(few)
    assert Check(0.5001, 9.0, 10**9).better_than(Check(0.5, 1.0, 10**9))


def test_gains_in_loss_do_not_add_up_to_a_loss_of_agreement():
    model, checks = Point(), [Check(0.50, 3.0, 98), Check(0.42, 2.0, 98), Check(0.36, 1.0, 98)]
    fit = train(model, model.loss, plain(2), Loop(check=lambda: checks.pop(0), check_every=1))
    assert fit.best_step == 1
    assert float(model.weight.detach()) == pytest.approx(plain(2).lr_at(0))


def test_a_ruined_student_goes_back_to_its_best_and_on_at_a_third_of_the_rate():
    model, seen = Point(), []

    def loss(step: int) -> torch.Tensor:
        seen.append(float(model.weight.detach()))
        return model.loss(step)

    checks = [Check(0.5, 1.0, 9), Check(0.6, 0.9, 9), Check(0.1, 9.0, 9), Check(0.6, 0.8, 9)]
    fit = train(model, loss, plain(3), Loop(check=lambda: checks.pop(0), check_every=1))
    rates = [plain(3).lr_at(step) for step in range(3)]
    assert seen[2] == seen[1] == pytest.approx(rates[0])
    assert float(model.weight.detach()) == pytest.approx(rates[0] + rates[2] / 3)
    assert fit.best_step == 3


def test_a_ruined_student_with_nothing_to_learn_goes_back_too():
    model, checks = Point().requires_grad_(False), [Check(0.6, 0.9, 9), Check(0.1, 9.0, 9)]
    fit = train(model, lambda step: torch.tensor(0.0), plain(1), Loop(check=lambda: checks.pop(0), check_every=1))
    assert (fit.best_step, fit.rolled_back) == (0, True)


def test_answers_of_nan_are_never_better_and_always_beaten():
    assert not Check(0.9, math.nan).better_than(Check(0.1, 1.0))
    assert Check(0.1, 1.0).better_than(Check(0.9, math.nan))
    assert not Check(0.9, math.nan).better_than(Check(0.1, math.nan))


def test_without_a_check_the_last_state_stays():
    model = Point()
    fit = train(model, model.loss, plain(3), Loop())
    assert (fit.best_step, fit.rolled_back, fit.checks) == (3, False, ())
    assert float(model.weight.detach()) > 0


def test_the_end_is_checked_whatever_the_interval():
    model = Point()
    fit = train(model, model.loss, plain(5), Loop(check=scripted(0.0, 0.1, 0.2, 0.3), check_every=2))
    assert [step for step, _, _ in fit.checks] == [0, 2, 4, 5]
    assert len(fit.losses) == 3


def test_batch_statistics_come_back_with_the_weights():
    model, batch = tiny_model().train(), tiny_samples().batch(slice(None))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loop = Loop(check=scripted(0.9, 0.1, 0.1), check_every=1)
    train(model, lambda _step: model(batch * 5).square().mean(), Schedule(steps=2, lr=0.1), loop)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_patience_ends_a_run_without_progress():
    model = Point()
    loop = Loop(check=scripted(0.5, 0.6, 0.6, 0.6, 0.9), check_every=1, patience=2)
    fit = train(model, model.loss, plain(50), loop)
    assert (fit.steps, fit.stopped, fit.best_step) == (3, "no progress", 1)


def test_a_deadline_ends_a_run_with_its_best_state():
    model, now = Point(), [0.0]

    def loss(step: int) -> torch.Tensor:
        now[0] += 1.0
        return model.loss(step)

    loop = Loop(check=scripted(0.1, 0.9, 0.2), check_every=2, deadline=2.5, clock=lambda: now[0])
    fit = train(model, loss, plain(50), loop)
    assert (fit.steps, fit.stopped, fit.best_step) == (3, "time budget", 2)
    assert [step for step, _, _ in fit.checks] == [0, 2, 3]


# --- what goes wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_left_out(bad):
    model = Point()
    fit = train(model, lambda step: model.loss(step) * (bad if step == 1 else 1.0), plain(3), Loop())
    rates = [plain(3).lr_at(0), plain(3).lr_at(2)]
    assert fit.steps == 3
    assert float(model.weight.detach()) == pytest.approx(rates[0] + (0.9 + 1) * rates[1])


def test_a_gradient_that_is_not_finite_is_left_out():
    model = Point()
    # sqrt has an infinite gradient at zero: the loss is finite, its gradient is not.
    train(model, lambda _step: model.weight.abs().sqrt() * 0 + model.weight.abs().sqrt(), plain(2, clip=1.0), Loop())
    assert float(model.weight.detach()) == 0.0


def test_nothing_to_train_is_no_error():
    model = Point().requires_grad_(False)
    fit = train(model, model.loss, plain(2), Loop(check=scripted(0.5, 0.5)))
    assert fit.steps == 2
    assert float(model.weight.detach()) == 0.0


def test_frozen_parameters_stay():
    model, batch = tiny_model(), tiny_samples().batch(slice(None))
    model.head.requires_grad_(False)
    before = clone(model)
    train(model, lambda _step: model(batch).square().mean(), Schedule(steps=2, lr=0.1), Loop())
    assert torch.equal(model.head.weight, before.head.weight)
    assert not torch.equal(model.stem[0].weight, before.stem[0].weight)


# --- going on after a kill


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_ends_at_the_same_weights_to_the_bit(tmp_path, optimizer):
    schedule = Schedule(steps=8, lr=0.05, optimizer=optimizer)
    samples = tiny_samples(12)

    def run(stop_at: int | None, state=None):
        model = tiny_model(dropout=0.3).train()
        now = [0.0]

        def loss(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            now[0] += 1.0
            return model(samples.batch(batch_order(12, 5, step, 0))).square().mean()

        def check() -> Check:
            model.eval()
            with torch.no_grad():
                value = float(model(samples.batch(slice(None))).square().mean())
            model.train()
            return Check(0.5, value, 12)

        loop = Loop(check=check, check_every=2, state=state, save_seconds=0.0, clock=lambda: now[0])
        try:
            fit = train(model, loss, schedule, loop)
        except KeyboardInterrupt:
            return None, model
        return fit, model

    whole, wanted = run(None)
    state = tmp_path / "run.safetensors"
    assert run(5, state)[0] is None
    assert state.exists()
    torch.manual_seed(123)  # another process would start from another random state
    resumed, model = run(None, state)
    assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in model.state_dict().items())
    assert (resumed.steps, resumed.best_step, resumed.checks) == (whole.steps, whole.best_step, whole.checks)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize("broken", [b"", b"half a file", None])
def test_a_broken_or_foreign_state_starts_again(tmp_path, broken):
    state = tmp_path / "run.safetensors"
    if broken is None:
        other = nn.Linear(2, 2)
        train(other, lambda _s: other.weight.sum(), plain(2), Loop(state=state, save_seconds=-1.0))
    else:
        state.write_bytes(broken)
    model = Point()
    fit = train(model, model.loss, plain(2), Loop(state=state, save_seconds=1e9))
    assert fit.steps == 2
    assert float(model.weight.detach()) == pytest.approx(2.9)


def test_training_draws_nothing_from_the_callers_random_state():
    model, batch, state = tiny_model(dropout=0.5).train(), tiny_samples().batch(slice(None)), torch.get_rng_state()
    train(model, lambda _step: model(batch).mean(), Schedule(steps=2, lr=0.1), Loop())
    assert torch.equal(state, torch.get_rng_state())


# --- mixed precision


@pytest.mark.parametrize(("wanted", "amp"), [("on", True), ("off", False)])
def test_mixed_precision_by_order_is_not_measured(wanted, amp):
    def step(_amp: bool) -> None:
        raise AssertionError("measured")

    assert choose_amp(step, torch.device("cpu"), wanted) is amp


def test_mixed_precision_is_measured_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr("ttmpd.training.loop._native_bfloat16", lambda: True)
    now, tried = [0.0], []
    monkeypatch.setattr("ttmpd.training.loop.time.perf_counter", lambda: now[0])
    for seconds, faster in [({True: 1.0, False: 2.0}, True), ({True: 1.9, False: 2.0}, False)]:
        tried.clear()

        def step(amp: bool, seconds=seconds) -> None:
            tried.append(amp)
            now[0] += seconds[amp]

        assert choose_amp(step, torch.device("cpu")) is faster
        assert sorted(tried) == [False] * 3 + [True] * 3
    monkeypatch.setattr("ttmpd.training.loop._native_bfloat16", lambda: False)
    tried.clear()
    assert choose_amp(step, torch.device("cpu")) is False
    assert tried == []


def test_a_best_state_from_before_the_kill_is_not_forgotten(tmp_path):
    def run(stop_at: int | None, *agreements: float):
        model = Point()

        def loss(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return model.loss(step)

        loop = Loop(check=scripted(*agreements), check_every=1, patience=3, state=tmp_path / "run", save_seconds=-1.0)
        try:
            return train(model, loss, plain(6), loop), model
        except KeyboardInterrupt:
            return None, model

    assert run(3, 0.1, 0.9, 0.5, 0.5)[0] is None
    fit, model = run(None, 0.5)
    assert (fit.steps, fit.stopped, fit.best_step, fit.rolled_back) == (4, "no progress", 1, False)
    assert float(model.weight.detach()) == pytest.approx(plain(6).lr_at(0))


def test_stored_bytes_counts_activations_once_and_no_parameters():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)
    # Stored: x for the weight's gradient, and the square's input; 4 x 8 floats each.
    assert stored_bytes(lambda: layer(x).square().sum()) == 2 * 4 * 8 * 4
    with torch.no_grad():
        assert stored_bytes(lambda: layer(x).square().sum()) == 0
