from ttmpd.plan.random import Random
from ttmpd.records import Option

OPTIONS = [Option(f"u{i}", action, 1.0, 1.0) for i in range(6) for action in ("drop", "linear")]


def test_seeds_give_different_plans():
    plans = {Random().choose(OPTIONS, 3.0, seed=seed) for seed in range(20)}
    assert len(plans) > 10
    assert all(len(plan) == 3 for plan in plans)


def test_every_unit_is_drawn_about_equally_often():
    drawn = [option.unit_id for seed in range(300) for option in Random().choose(OPTIONS, 2.0, seed=seed)]
    counts = [drawn.count(f"u{i}") for i in range(6)]
    assert sum(counts) == 600
    assert min(counts) > 60


def test_a_larger_budget_adds_to_the_same_plan():
    for seed in range(5):
        small = Random().choose(OPTIONS, 2.0, seed=seed)
        assert Random().choose(OPTIONS, 5.0, seed=seed)[:2] == small


def test_options_that_cost_time_are_never_drawn():
    options = [Option("a", "linear", 0.0, -1.0), Option("b", "drop", 9.0, 1.0)]
    assert all(Random().choose(options, 1.0, seed=seed) == (options[1],) for seed in range(10))
