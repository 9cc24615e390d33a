"""What is timed on what: both models in turn, on the same samples, each leaving where it shall."""

from collections.abc import Callable, Mapping

import pytest
import torch

from ttmpd.early_exit.right_tool import RightTool
from ttmpd.errors import BudgetUnreachableError
from ttmpd.latency import exits as _latency
from ttmpd.latency.exits import exit_ms, mean_timings, routed_timings, speedup_of
from ttmpd.latency.timing import Timings
from ttmpd.models.modules import clone
from ttmpd.pipeline import exit_choice as _choice
from ttmpd.pipeline.exit_threshold import ExitConfidences, exit_confidences
from ttmpd.testing.tiny_models import tiny_model, tiny_samples

QUICK = RightTool(steps=3, views=1)


@pytest.fixture(scope="module")
def equipped():
    return QUICK.equip(tiny_model(), tiny_samples(16))


@pytest.fixture
def counted(equipped):
    """The model without and with exits; every block that runs costs one second per batch, and a head a tenth."""
    now = [0.0]
    original, model = tiny_model(), clone(equipped.model)

    def cost(seconds: float) -> Callable[..., None]:
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    for blocks in (original.blocks, model.backbone.blocks):
        for block in blocks:
            block.register_forward_pre_hook(cost(1.0))
    for head in model.heads:
        head.register_forward_hook(cost(0.1))
    return original, model, lambda: now[0]


@pytest.fixture
def by_count(counted, monkeypatch):
    """Seconds are counted, not measured."""
    true = _latency.interleaved

    def interleaved(candidates: Mapping[str, Callable[[], object]], **settings: object) -> Timings:
        return true(candidates, **settings | {"clock": counted[2]})

    monkeypatch.setattr(_latency, "interleaved", interleaved)
    monkeypatch.setattr(_latency, "time_models", lambda *_a, **_k: Timings({"original": (3000.0,)}))
    monkeypatch.setattr(_latency, "SECONDS", 600.0)


def test_leaving_later_takes_longer_by_what_was_run(counted, by_count):
    original, ms = exit_ms(counted[0], counted[1], tiny_samples(4), 2)
    assert original == pytest.approx(3000)
    assert ms == pytest.approx((1100, 2200, 3200))


def test_mean_is_that_of_the_prescribed_exits(counted, by_count):
    depths = torch.tensor([0, 0, 1, 2])
    rounds = mean_timings(counted[0], counted[1], tiny_samples(4), depths, 1, 6000)
    assert rounds.ms["original"] == pytest.approx([3000] * _latency.PASSES)
    assert rounds.ms["compressed"] == pytest.approx([(1100 + 1100 + 2200 + 3200) / 4] * _latency.PASSES)
    assert speedup_of(rounds)[1] == pytest.approx(3000 / 1900)


def test_a_part_of_the_samples_stands_for_all_depths(counted, by_count, monkeypatch):
    monkeypatch.setattr(_latency, "SECONDS", 120.0)
    depths = torch.tensor([0] * 20 + [1] * 10 + [2] * 10)
    rounds = mean_timings(counted[0], counted[1], tiny_samples(40), depths, 1, 6000)
    assert rounds.ms["compressed"][0] == pytest.approx((2 * 1100 + 2200 + 3200) / 4)  # four samples


def test_both_models_get_the_same_batches_and_too_few_samples_are_repeated(equipped, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {"original": [], "compressed": []}

    def interleaved(candidates, *, rounds, warmup, **_):
        for _round in range(warmup + rounds):
            for run in candidates.values():
                run()
        return Timings(dict.fromkeys(candidates, (1.0,) * rounds))

    monkeypatch.setattr(_latency, "interleaved", interleaved)
    original, model = tiny_model(), clone(equipped.model)
    original.stem.register_forward_pre_hook(lambda _m, args: seen["original"].append(args[0]))
    model.backbone.stem.register_forward_pre_hook(lambda _m, args: seen["compressed"].append(args[0]))
    mean_timings(original, model, tiny_samples(3), torch.tensor([0, 1, 2]), 4, 1.0)
    assert all(len(batch) == 4 for batch in seen["original"])
    pairs = zip(seen["original"], seen["compressed"], strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_own_exits_are_those_of_the_threshold(counted, by_count):
    model = counted[1]
    model.threshold = 0.0
    assert routed_timings(counted[0], model, tiny_samples(6), 1).ms["compressed"][0] == pytest.approx(1100)
    model.threshold = 1.1
    assert routed_timings(counted[0], model, tiny_samples(6), 1).ms["compressed"][0] == pytest.approx(3200)


# --------------------------------------------------------------------------------------------------------------- choice


def choose(counted, equipped, budget: float) -> _choice.ThresholdChoice:
    sure, samples = exit_confidences(equipped.exit_logits, equipped.logits), tiny_samples(16)
    timed = _choice.time_exits(counted[0], counted[1], samples, 1)
    return _choice.choose(counted[0], counted[1], samples, sure, timed, budget)


def test_the_choice_meets_the_budget_as_measured(counted, by_count, equipped):
    for budget in (1500.0, 2000.0, 2900.0):
        choice = choose(counted, equipped, budget)
        measured = choice.original_ms / speedup_of(choice.timings)[1]
        assert choice.met and not choice.within_spread
        assert measured == pytest.approx(choice.predicted_ms)
        assert measured <= budget * (1 + 1e-6)
        assert len(choice.attempts) == 1


def test_a_prediction_that_was_too_fast_is_corrected(counted, by_count, equipped, monkeypatch):
    true = _choice.exit_ms

    def too_fast(*arguments):
        original, ms = true(*arguments)
        return original, tuple(0.8 * value for value in ms)

    monkeypatch.setattr(_choice, "exit_ms", too_fast)
    choice = choose(counted, equipped, 2000.0)
    assert choice.attempts[0][1] > 2000 >= choice.attempts[-1][1]
    assert choice.met
    assert choice.shares(len(equipped.exit_logits)) == pytest.approx(
        [float((choice.depths == k).float().mean()) for k in range(3)]
    )


def test_nothing_is_faster_than_the_first_exit(counted, by_count, equipped):
    with pytest.raises(BudgetUnreachableError) as caught:
        choose(counted, equipped, 1000.0)
    assert caught.value.best_ms == pytest.approx(1100)


def test_what_is_taken_off_is_gone_from_all_that_is_known(equipped):
    sure = exit_confidences(equipped.exit_logits, equipped.logits)
    useless = ExitConfidences(sure.confidence.clone(), sure.agrees)
    useless.confidence[0], useless.confidence[1] = 0.0, torch.linspace(0.6, 1, 16)  # nobody leaves at the first one
    timed = _choice.ExitLatencies(3000.0, (1100.0, 2200.0, 3200.0), 1)
    few, left, times = _choice.fitted(QUICK, equipped, useless, timed, 2900.0)
    assert [place.path for place in few.model.spec.exits] == ["blocks.1"]
    assert torch.equal(few.exit_logits, equipped.exit_logits[1:])
    assert torch.equal(left.confidence, useless.confidence[1:])
    assert times.ms == pytest.approx((2100, 3100))
    assert few.facts == equipped.facts[1:]
    every, _, _ = _choice.fitted(RightTool(prune=False), equipped, useless, timed, 2900.0)
    assert every.model.spec.saved_shares == pytest.approx((1.0, 1000 / 2100))
    assert equipped.model.spec.saved_shares == ()  # what was passed in stays as it was
