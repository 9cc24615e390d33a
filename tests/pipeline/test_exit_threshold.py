"""The threshold that is chosen, on confidences written down by hand."""

import pytest
import torch

from ttmpd.errors import BudgetUnreachableError, InvalidValueError
from ttmpd.pipeline.exit_threshold import (
    ExitConfidences,
    choose_threshold,
    curve,
    exit_confidences,
    mean_ms,
    ms_of,
    prune_exits,
    rising,
    saved_shares_of,
)
from ttmpd.surgery.exits.spec import NEVER, Exit, Exits

MS = (2.0, 5.0, 10.0)
SURE = ExitConfidences(
    torch.tensor([[0.9, 0.8, 0.5, 0.4], [0.9, 0.95, 0.7, 0.6]]),
    torch.tensor([[True, False, False, True], [True, True, True, False]]),
)


def test_a_sample_leaves_at_the_first_exit_that_is_sure_enough():
    assert SURE.depths(0.75).tolist() == [0, 0, 2, 2]
    assert SURE.depths(0.7).tolist() == [0, 0, 1, 2]
    assert SURE.depths(0.0).tolist() == [0, 0, 0, 0]
    assert SURE.depths(NEVER).tolist() == [2, 2, 2, 2]
    assert SURE.depths(0.9).tolist() == [0, 1, 2, 2]  # just as sure is sure enough


def test_agreement_counts_the_end_as_the_model_itself():
    assert SURE.agreement(SURE.depths(NEVER)) == 1.0
    assert SURE.agreement(SURE.depths(0.0)) == 0.5
    assert SURE.agreement(torch.tensor([1, 1, 1, 1])) == 0.75


@pytest.mark.parametrize(
    ("budget", "depths"),
    [(10.0, [2, 2, 2, 2]), (9.9, [2, 1, 2, 2]), (7.0, [0, 1, 2, 2]), (5.0, [0, 0, 1, 2]), (2.0, [0, 0, 0, 0])],
)
def test_the_most_cautious_threshold_within_the_budget(budget, depths):
    threshold = choose_threshold(SURE, MS, budget)
    assert SURE.depths(threshold).tolist() == depths
    assert mean_ms(SURE.depths(threshold), MS) <= budget
    higher = [value for value in [*SURE.confidence.flatten().tolist(), NEVER] if value > threshold]
    assert all(mean_ms(SURE.depths(value), MS) > budget for value in higher)


def test_what_the_first_exit_takes_is_the_least():
    with pytest.raises(BudgetUnreachableError, match="at least 2 ms") as caught:
        choose_threshold(SURE, MS, 1.9)
    assert caught.value.best_ms == 2.0


def test_thresholds_agree_with_a_search_through_all_of_them():
    generator = torch.Generator().manual_seed(0)
    confidences = ExitConfidences(torch.rand(3, 50, generator=generator), torch.rand(3, 50, generator=generator) < 0.8)
    ms = (1.0, 2.0, 4.0, 5.0)
    every = sorted({0.0, NEVER, *confidences.confidence.flatten().tolist()})
    for budget in (1.0, 1.7, 2.5, 3.9, 5.0):
        best = max(value for value in every if mean_ms(confidences.depths(value), ms) <= budget)
        assert choose_threshold(confidences, ms, budget) == best


def test_the_curve_runs_from_the_first_exit_to_the_end():
    points = curve(SURE, MS)
    assert (points[0].ms, points[0].shares) == (2.0, (1.0, 0.0, 0.0))
    assert (points[-1].ms, points[-1].agreement) == (10.0, 1.0)
    assert [point.ms for point in points] == sorted(point.ms for point in points)
    assert all(sum(point.shares) == pytest.approx(1) for point in points)


def test_milliseconds_never_fall():
    assert rising((2.0, 1.5, 3.0, 2.9)) == (2.0, 2.0, 3.0, 3.0)


def test_sure_of_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    found = exit_confidences(torch.stack([logits.flip(0), logits]), logits)
    assert found.agrees.tolist() == [[False, False], [True, True]]
    assert found.confidence[1, 0] == pytest.approx(float(logits[0].softmax(-1)[0]))


def test_an_exit_that_few_take_is_not_worth_its_time():
    # Half of the samples leave at the first exit, none at the second, which costs 0.4 of 10 ms.
    confidences = ExitConfidences(
        torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]), torch.ones(2, 4, dtype=torch.bool)
    )
    ms = (2.0, 6.0, 10.8)
    assert prune_exits(confidences, ms, 10.0, 7.0, by_time=False) == prune_exits(confidences, ms, 10.0, 7.0) == (0,)
    assert ms_of((0,), ms, 10.0) == pytest.approx((2.0, 10.4))
    assert ms_of((1,), ms, 10.0) == pytest.approx((5.6, 10.4))
    assert ms_of((0, 1), ms, 10.0) == ms
    assert ms_of((0,), (2.0, 6.0, 19.0), 10.0) == pytest.approx((2.0, 18.6))  # an exit cannot cost that much


def test_doubt_is_allowed_by_what_leaving_saves():
    ms = (2.0, 6.0, 10.0)
    assert saved_shares_of(ms) == (1.0, 0.5)
    # 0.8 at the first exit, and then 0.9: half of the doubt.
    weighed = SURE.weighed(saved_shares_of(ms))
    assert weighed.depths(0.8).tolist() == [0, 0, 2, 2]
    assert weighed.depths(0.81).tolist() == [0, 1, 2, 2]
    assert weighed.depths(0.0).tolist() == [0, 0, 0, 0]
    assert weighed.depths(NEVER).tolist() == [2, 2, 2, 2]
    spec = Exits(
        tuple(Exit(path, (path,), "flat", "channels_last", 1) for path in "ab"), ("a", "b"), 2, saved_shares=(1.0, 0.5)
    )
    assert spec.thresholds(0.8) == pytest.approx((0.8, 0.9))
    assert spec.thresholds(0.0) == (0.0, 0.5)
    assert all(value > 1 for value in spec.thresholds(1.0001))
    for threshold in (0.0, 0.3, 0.79, 0.8, 0.95, 1.0):  # the model and the choice of the threshold agree
        own = torch.tensor(spec.thresholds(threshold))[:, None]
        leaves = SURE.confidence >= own - 1e-6
        wanted = [next((k for k in range(2) if leaves[k, i]), 2) for i in range(4)]
        assert weighed.depths(threshold - 1e-6).tolist() == wanted
    assert saved_shares_of((5.0, 5.0)) == (1.0,)
    assert min(saved_shares_of((1.0, 9.0, 9.0))) > 0
    with pytest.raises(InvalidValueError, match="one share"):
        Exits(spec.exits, ("a", "b"), 2, saved_shares=(1.0,))


def test_exits_stay_where_samples_that_went_on_would_cost_more():
    # A quarter leaves at each exit; without one of them that quarter costs 1 ms more or more, the others save 0.1.
    confidences = ExitConfidences(
        torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1], [0.9, 0.9, 0.9, 0.1]]), torch.ones(3, 4) > 0
    )
    ms = (3.0, 7.0, 11.0, 15.3)
    assert prune_exits(confidences, ms, 15.0, 9.1, by_time=False) == (0, 1, 2)
    with pytest.raises(BudgetUnreachableError):
        prune_exits(confidences, ms, 15.0, 2.0)


def test_pruning_never_makes_the_mean_slower_at_the_threshold():
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        confidences = ExitConfidences(
            torch.rand(4, 100, generator=generator), torch.rand(4, 100, generator=generator) < 0.9
        )
        ms, budget = (2.0, 4.0, 6.0, 8.0, 10.8), 4.0 + 0.25 * seed
        kept = prune_exits(confidences, ms, 10.0, budget, by_time=False)
        before = choose_threshold(confidences, ms, budget)
        few = ms_of(kept, ms, 10.0)
        assert mean_ms(confidences.only(kept).depths(before), few) <= mean_ms(confidences.depths(before), ms)
        assert choose_threshold(confidences.only(kept), few, budget) >= before
