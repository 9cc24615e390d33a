"""Checks of planners."""

import itertools
import random
from collections.abc import Sequence

from ttmpd.errors import BudgetUnreachableError
from ttmpd.plan.base import Planner, most_saved
from ttmpd.records import Option
from ttmpd.testing.tiny_models import require


def tiny_options(seed: int = 0, n_units: int = 7) -> tuple[Option, ...]:
    """Two options per unit: "drop" saves more and hurts more than "linear"; one stand-in costs time."""
    draw = random.Random(seed)
    options = []
    for number in range(n_units):
        saved, harm = draw.uniform(0.5, 2.0), draw.uniform(0.1, 1.0)
        options.append(Option(f"unit {number}", "drop", harm, saved))
        share = -0.1 if number == 0 else draw.uniform(0.3, 0.9)
        options.append(Option(f"unit {number}", "linear", harm * draw.uniform(0.2, 0.9), saved * share))
    return tuple(options)


def _budgets(options: Sequence[Option], n: int = 12) -> list[float]:
    return [most_saved(options) * i / n for i in range(n + 1)]


def check_plan_meets(planner: Planner) -> None:
    """Every reachable budget is met, with at most one option per unit, all of them from the offer."""
    for seed in range(5):
        options = tiny_options(seed)
        for needed in _budgets(options):
            chosen = planner.choose(options, needed, seed=seed)
            units = [option.unit_id for option in chosen]
            require(len(set(units)) == len(units), "a plan must choose one option per unit")
            require(set(chosen) <= set(options), "a plan must choose among the options")
            saved = sum(option.saved_ms for option in chosen)
            require(saved >= needed - 1e-6, f"a plan must save {needed} ms, but saves {saved}")


def check_plan_unreachable(planner: Planner) -> None:
    """A budget out of reach is refused, with the most that can be saved."""
    options = tiny_options()
    best = sum(max(o.saved_ms for o in options if o.unit_id == unit) for unit in {o.unit_id for o in options})
    for offer, most in ((options, best), ((), 0.0)):
        try:
            planner.choose(offer, best + 0.01)
        except BudgetUnreachableError as error:
            require(abs(error.best_ms - most) < 1e-9, f"best_ms must be {most}, but got {error.best_ms}")
        else:
            raise AssertionError("a plan that cannot be met must raise BudgetUnreachableError")


def check_plan_of_nothing(planner: Planner) -> None:
    """When nothing has to go, nothing is removed; not even where there is nothing."""
    require(planner.choose(tiny_options(), 0.0) == (), "a plan that need not save must remove nothing")
    require(planner.choose(tiny_options(), -1.0) == (), "a plan that need not save must remove nothing")
    require(planner.choose((), 0.0) == (), "no options must give an empty plan")


def check_plan_monotone(planner: Planner) -> None:
    """More time to keep never means more harm."""
    for seed in range(5):
        options = tiny_options(seed)
        harms = [sum(o.harm for o in planner.choose(options, needed, seed=seed)) for needed in _budgets(options)]
        rises = all(low <= high + 1e-9 for low, high in itertools.pairwise(harms))
        require(rises, f"harm must rise with what must be saved, but got {harms}")


def check_plan_repeats(planner: Planner) -> None:
    """The same seed gives the same plan, and Python's own random state is left alone."""
    options = tiny_options()
    state = random.getstate()
    plans = [planner.choose(options, 4.0, seed=3) for _ in range(2)]
    require(plans[0] == plans[1], "the same seed must give the same plan")
    require(state == random.getstate(), "the random state of Python must stay as it was")


CHECKS = (
    check_plan_meets,
    check_plan_unreachable,
    check_plan_of_nothing,
    check_plan_monotone,
    check_plan_repeats,
)
