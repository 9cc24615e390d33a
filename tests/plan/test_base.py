"""Every planner on units that lie in one another, against all plans there are."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmpd.errors import BudgetUnreachableError, InvalidValueError
from ttmpd.plan.base import Planner, most_saved, unit_tree
from ttmpd.plan.greedy import Greedy
from ttmpd.plan.knapsack import Knapsack
from ttmpd.plan.random import Random
from ttmpd.records import Option

eighths = st.integers(0, 24).map(lambda n: n / 8)  # add up exactly
savings = st.integers(-4, 24).map(lambda n: n / 8)


@st.composite
def nested_options(draw) -> list[Option]:
    """Up to nine options of units in a random forest; a unit may have none and still hold others."""
    options: list[Option] = []
    chains: list[tuple[str, ...]] = []
    for number in range(draw(st.integers(1, 7))):
        holders = draw(st.sampled_from([(), *chains]))
        chains.append((*holders, f"u{number}"))
        for action in draw(st.sampled_from([("drop",), ("drop", "linear"), ()])):
            options.append(Option(f"u{number}", action, draw(eighths), draw(savings), holders=holders))
    return options[:9]


def all_plans(options: list[Option]) -> list[tuple[Option, ...]]:
    """Every set of options of which none excludes another, by trying all of them."""
    sets = (chosen for n in range(len(options) + 1) for chosen in combinations(options, n))
    return [chosen for chosen in sets if not any(a.excludes(b) for a, b in combinations(chosen, 2))]


def saved(chosen: tuple[Option, ...]) -> float:
    return sum(option.saved_ms for option in chosen)


@settings(max_examples=150, deadline=None)
@given(options=nested_options())
def test_the_most_that_can_be_saved_is_that_of_the_best_plan(options):
    assert most_saved(options) == max(map(saved, all_plans(options)))


@settings(max_examples=200, deadline=None)
@given(options=nested_options(), share=st.floats(0, 1))
def test_no_plan_of_nested_units_hurts_less_than_that_of_the_knapsack(options, share):
    needed = round(most_saved(options) * share * 8) / 8
    plans = all_plans(options)
    chosen = Knapsack().choose(options, needed)
    assert set(chosen) in map(set, plans)
    assert saved(chosen) >= needed
    assert sum(o.harm for o in chosen) == min(sum(o.harm for o in plan) for plan in plans if saved(plan) >= needed)


@pytest.mark.parametrize("planner", [Knapsack(), Greedy(), Random()])
@settings(max_examples=100, deadline=None)
@given(options=nested_options(), share=st.floats(0, 1))
def test_what_can_be_saved_is_saved_by_units_of_which_none_holds_another(planner: Planner, options, share):
    needed = most_saved(options) * share
    chosen = planner.choose(options, needed, seed=3)
    assert not any(a.excludes(b) for a, b in combinations(chosen, 2))
    assert saved(chosen) >= needed - 1e-9


@pytest.mark.parametrize("planner", [Knapsack(), Greedy(), Random()])
@settings(max_examples=30, deadline=None)
@given(options=nested_options())
def test_more_than_all_nested_units_save_is_refused(planner: Planner, options):
    with pytest.raises(BudgetUnreachableError) as caught:
        planner.choose(options, most_saved(options) + 0.125)
    assert caught.value.best_ms == most_saved(options)


def test_a_block_an_attention_and_its_heads_are_one_choice():
    heads = Option("heads", "narrow", 0.1, 1.0, (0,), holders=("block", "attention"))
    attention = Option("attention", "drop", 0.5, 2.0, holders=("block",))
    mlp = Option("mlp", "drop", 0.5, 2.0, holders=("block",))
    block = Option("block", "drop", 2.0, 4.5)
    options = [heads, attention, mlp, block]
    chosen = [{o.unit_id for o in Knapsack().choose(options, needed)} for needed in (1.0, 2.0, 3.0, 4.0, 4.5)]
    assert chosen == [{"heads"}, {"attention"}, {"heads", "mlp"}, {"attention", "mlp"}, {"block"}]


def test_holders_that_fit_into_no_tree_are_refused():
    options = [Option("c", "drop", 1.0, 1.0, holders=("a",)), Option("d", "drop", 1.0, 1.0, holders=("b", "c"))]
    with pytest.raises(InvalidValueError, match=r"holders of d .* 'c' lies in 'b' here and in 'a' there"):
        unit_tree(options)
