"""From scored options to a plan: what is committed on the way, and when stand-ins are worth their milliseconds."""

from types import SimpleNamespace

import pytest

from ttmpd.pipeline.candidates import VARIANTS, PartialPlan, best_plan
from ttmpd.pipeline.planning import Attempt, _best, _Bisection, needed_ms
from ttmpd.pipeline.settings import Target
from ttmpd.plan.knapsack import Knapsack
from ttmpd.records import DepthUnit, Option, Score

STAND_IN_MS = 1.0


def analysis(harms: dict[str, tuple[float, float, float]]) -> SimpleNamespace:
    """Units by name: milliseconds, damage and repaired damage; names with one letter before the dot are one run."""
    units = tuple(DepthUnit("block", name, "Block", (4,), "channels_last", 1, 1) for name in harms)
    scores = [
        Score(name, action, repaired + (0.02 * (damage - repaired) if action == "drop" else 0.0),
              {"damage": damage, "repaired_damage": repaired})
        for name, (_, damage, repaired) in harms.items() for action in ("drop", "linear")
    ]  # fmt: skip
    options = tuple(
        Option(s.unit_id, s.action, s.harm, harms[s.unit_id][0] - (STAND_IN_MS if s.action == "linear" else 0.0))
        for s in scores
    )
    settings = SimpleNamespace(plan=Knapsack(), actions=("drop", "linear"), seed=0)
    return SimpleNamespace(
        units=units,
        options=options,
        settings=settings,
        original_ms=100.0,
        lossless_ms=100.0,
    )


def ranked(here, path, needed_ms, harm_of=None, variants=VARIANTS):
    return best_plan(path, needed_ms, units=here.units, settings=here.settings, harm_of=harm_of, variants=variants)


def chosen_for(here, path, needed_ms, harm_of=None):
    return ranked(here, path, needed_ms, harm_of)[0]


def actions(chosen):
    return {option.unit_id: option.action for option in chosen}


def test_a_run_ends_in_a_stand_in_where_there_is_room():
    here = analysis({"a.0": (10.0, 0.5, 0.1), "a.1": (10.0, 0.5, 0.1), "b.0": (10.0, 5.0, 5.0)})
    assert actions(chosen_for(here, [PartialPlan((), here.options)], 19.0)) == {"a.0": "drop", "a.1": "linear"}


def test_a_stand_in_is_left_out_where_it_would_cost_another_large_unit():
    here = analysis({"a.0": (10.0, 0.5, 0.4), "a.1": (10.0, 0.5, 0.4), "b.0": (10.0, 0.9, 0.8)})
    assert actions(chosen_for(here, [PartialPlan((), here.options)], 19.5)) == {"a.0": "drop", "a.1": "drop"}


def test_another_small_unit_goes_where_its_stand_ins_repair_more():
    here = analysis({"a.0": (10.0, 3.0, 0.4), "a.1": (10.0, 3.0, 0.4), "b.0": (5.0, 0.3, 0.2)})

    def whole_plan(plan):
        return 5.0 if actions(plan) == {"a.0": "drop", "a.1": "drop"} else 1.0

    start = [PartialPlan((), here.options)]
    assert actions(chosen_for(here, start, 19.5)) == {"a.0": "drop", "a.1": "drop"}  # by their harms alone
    assert actions(chosen_for(here, start, 19.5, whole_plan)) == {"a.0": "drop", "a.1": "linear", "b.0": "linear"}


def test_ways_are_ranked_and_only_those_that_are_asked_for_looked_at():
    here = analysis({"a.0": (10.0, 3.0, 0.4), "a.1": (10.0, 3.0, 0.4), "b.0": (5.0, 0.3, 0.2)})
    start, judged = [PartialPlan((), here.options)], []

    def whole_plan(plan):
        judged.append(plan)
        return float(len(plan))

    plan, variants = ranked(here, start, 19.5, whole_plan)
    assert len(judged) == 2  # stand-ins, and none; the harm of narrowed layers makes no difference here
    assert [variant.end_replacements for variant in variants] == [False, False, True, True]
    assert best_plan(
        start, 19.5, units=here.units, settings=here.settings, harm_of=whole_plan, variants=variants[:1]
    ) == (plan, variants[:1])
    assert len(judged) == 2  # a single plan is the best there is


def test_where_the_best_way_leads_nowhere_the_others_are_tried():
    here = analysis({"a.0": (10.0, 3.0, 0.4), "a.1": (10.0, 3.0, 0.4)})
    start = [PartialPlan((), here.options)]
    stand_ins = next(variant for variant in VARIANTS if variant.end_replacements)
    assert actions(ranked(here, start, 19.0, None, [stand_ins])[0]) == {"a.0": "drop", "a.1": "linear"}
    assert actions(ranked(here, start, 19.9, None, [stand_ins])[0]) == {"a.0": "drop", "a.1": "drop"}


def test_on_the_way_the_least_harmful_part_of_the_whole_plan_is_committed():
    # For 10 ms alone `c.0` is best; for 29 ms it is of no use.
    here = analysis({"a.0": (15.0, 0.3, 0.3), "b.0": (15.0, 0.4, 0.4), "c.0": (11.0, 0.25, 0.25)})
    start = PartialPlan((), here.options)
    assert {option.unit_id for option in start.complete(10.0, here.settings)} == {"c.0"}
    assert [option.unit_id for option in start.extend(29.0, 10.0, here.settings)] == ["a.0"]
    assert [option.unit_id for option in start.extend(29.0, 16.0, here.settings)] == ["a.0", "b.0"]


def test_what_was_committed_on_the_way_is_given_up_for_a_plan_that_fits_better():
    here = analysis({"a.0": (10.0, 0.3, 0.3), "b.0": (8.0, 0.2, 0.2), "c.0": (10.0, 0.3, 0.3)})
    start = PartialPlan((), here.options)
    committed = tuple(o for o in here.options if (o.unit_id, o.action) in {("b.0", "drop"), ("a.0", "drop")})
    further = PartialPlan(committed, tuple(o for o in here.options if o.unit_id == "c.0"))
    plan = chosen_for(here, [start, further], 19.5)
    assert actions(plan) == {"a.0": "drop", "c.0": "drop"}  # and not all three


@pytest.mark.parametrize("needed", [5.0, 12.0, 29.0])
def test_a_plan_saves_what_is_needed(needed):
    here = analysis({"a.0": (10.0, 0.5, 0.1), "a.1": (10.0, 0.5, 0.2), "b.0": (10.0, 0.4, 0.3)})
    assert sum(option.saved_ms for option in chosen_for(here, [PartialPlan((), here.options)], needed)) >= needed


@pytest.mark.parametrize(("speedup", "expected"), [(2.0, 48.5), (1.05, 2.381), (1.01, 0.495)])
def test_the_first_plan_may_be_a_little_slow_but_removes_something(speedup, expected):
    assert needed_ms(SimpleNamespace(original_ms=100.0, lossless_ms=100.0), Target(speedup=speedup)) == pytest.approx(
        expected, abs=1e-3
    )


# --- what is asked for after a measurement


def attempt(measured_ms, error_ms=0.0, predicted_ms=50.0):
    return Attempt(predicted_ms, measured_ms, error_ms, ())


def test_what_was_missing_is_asked_for_with_a_little_more():
    ask = _Bisection(budget_ms=50.0, needed_ms=50.0)
    assert ask.update(attempt(54.0), promised_ms=50.0)
    assert ask.needed_ms == pytest.approx(50.0 + 1.1 * 4.0)


def test_what_was_too_much_is_given_back():
    ask = _Bisection(budget_ms=50.0, needed_ms=60.0)
    assert ask.update(attempt(40.0), promised_ms=60.0)
    assert ask.needed_ms == pytest.approx(60.0 - (49.5 - 40.0))


@pytest.mark.parametrize(("measured", "error", "goes_on"), [(49.5, 0.0, False), (47.0, 0.5, True), (47.0, 1.1, False)])
def test_a_plan_that_is_not_known_to_be_too_fast_is_kept(measured, error, goes_on):
    assert _Bisection(budget_ms=50.0, needed_ms=50.0).update(attempt(measured, error), promised_ms=50.0) == goes_on


def test_between_too_little_and_enough_the_middle_is_asked_for():
    ask = _Bisection(budget_ms=50.0, needed_ms=50.0)
    ask.update(attempt(51.0), promised_ms=50.0)
    ask.needed_ms = 56.0
    assert ask.update(attempt(30.0), promised_ms=56.0)  # giving back 19.5 would be less than what was too little
    assert ask.needed_ms == pytest.approx(53.0)


def test_of_plans_that_are_fast_enough_the_least_harmful_is_taken_and_no_other_judged():
    judged = []

    def harm_of(chosen):
        judged.append(chosen)
        return {"a": 3.0, "b": 1.0, "c": 0.0}[chosen[0]]

    slow, fast, late = attempt(49.0), attempt(48.0), attempt(52.0)
    tried = {slow: ["a"], fast: ["b"], late: ["c"]}
    assert _best(tried, 50.0, harm_of) == (fast, 1.0)
    assert judged == [["a"], ["b"]]
    assert _best(tried, 40.0, harm_of) == (fast, 1.0)  # none is: the fastest
