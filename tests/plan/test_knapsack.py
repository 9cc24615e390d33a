"""The exact planner against all plans there are."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmpd.errors import BudgetUnreachableError, InvalidValueError
from ttmpd.plan.base import most_saved
from ttmpd.plan.knapsack import Knapsack
from ttmpd.records import Option

number = st.integers(0, 40).map(lambda n: n / 8)
unit = st.tuples(number, st.integers(-8, 40).map(lambda n: n / 8), number, st.integers(-8, 40).map(lambda n: n / 8))


def options_of(rows) -> list[Option]:
    pairs = [
        (Option(str(i), "drop", h1, s1), Option(str(i), "linear", h2, s2)) for i, (h1, s1, h2, s2) in enumerate(rows)
    ]
    return [option for pair in pairs for option in pair]


def least_harm(rows, needed: float) -> float | None:
    """By trying every combination of keep, drop and linear."""
    harms = []
    for choice in product(range(3), repeat=len(rows)):
        picked = [(0.0, 0.0) if c == 0 else row[2 * c - 2 : 2 * c] for c, row in zip(choice, rows, strict=True)]
        if sum(saved for _, saved in picked) >= needed:
            harms.append(sum(harm for harm, _ in picked))
    return min(harms, default=None)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(unit, min_size=1, max_size=5), share=st.floats(0, 1.1))
def test_no_plan_hurts_less(rows, share):
    options = options_of(rows)
    needed = round(most_saved(options) * share * 8) / 8  # eighths add up exactly
    best = least_harm(rows, needed)
    if best is None:
        with pytest.raises(BudgetUnreachableError):
            Knapsack().choose(options, needed)
        return
    chosen = Knapsack().choose(options, needed)
    assert sum(o.saved_ms for o in chosen) >= needed
    assert sum(o.harm for o in chosen) == best
    assert len({o.unit_id for o in chosen}) == len(chosen)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(unit, min_size=2, max_size=9), share=st.floats(0, 1), limit=st.integers(2, 5))
def test_a_thinned_front_still_meets_the_budget(rows, share, limit):
    options = options_of(rows)
    needed = most_saved(options) * share
    chosen = Knapsack(max_front=limit).choose(options, needed)
    assert sum(o.saved_ms for o in chosen) >= needed - 1e-6
    assert sum(o.harm for o in chosen) >= sum(o.harm for o in Knapsack().choose(options, needed)) - 1e-9


def test_one_large_removal_may_beat_two_cheap_ones():
    options = [Option("a", "drop", 1.0, 2.0), Option("b", "drop", 1.0, 2.0), Option("c", "drop", 1.5, 3.0)]
    assert [o.unit_id for o in Knapsack().choose(options, 3.0)] == ["c"]


def test_linear_is_chosen_where_it_saves_enough():
    options = [Option("a", "drop", 1.0, 2.0), Option("a", "linear", 0.1, 1.5)]
    assert [o.action for o in Knapsack().choose(options, 1.5)] == ["linear"]
    assert [o.action for o in Knapsack().choose(options, 1.6)] == ["drop"]


def test_negative_harm_counts_as_none_and_does_not_buy_more_removals():
    options = [Option("a", "drop", -5.0, 1.0), Option("b", "drop", 0.5, 1.0)]
    assert [o.unit_id for o in Knapsack().choose(options, 1.0)] == ["a"]


def test_many_units_stay_cheap():
    draws = [((i * 37) % 101 / 7, (i * 53) % 97 / 11, (i * 29) % 89 / 13, (i * 71) % 83 / 17) for i in range(60)]
    options = options_of(draws)
    needed = most_saved(options) / 2
    chosen = Knapsack(max_front=500).choose(options, needed)
    assert sum(o.saved_ms for o in chosen) >= needed


def test_a_front_of_one_point_is_refused():
    with pytest.raises(InvalidValueError, match="max_front"):
        Knapsack(max_front=1)
