"""From a target to a plan that was measured: choose, cut, time the cut model, correct."""

import dataclasses
import math
from collections.abc import Sequence

from ttmpd.errors import BudgetUnreachableError
from ttmpd.plan.base import most_saved
from ttmpd.ready import Ready
from ttmpd.records import Action, Option, Plan, Removal
from ttmpd.savings import compare, skeleton
from ttmpd.settings import Target
from ttmpd.units.block import Block

MAX_PLANS = 4
"""Rounds of planning, cutting and measuring before the best reachable is taken."""
MARGIN = 0.015
"""How much faster than asked a plan aims to be: measured medians move by about as much."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One round of the planner: what was predicted, what the cut model measured."""

    predicted_ms: float
    measured_ms: float
    harm: float
    actions: dict[str, Action]


def make_plan(ready: Ready, target: Target) -> tuple[Plan, list[Attempt]]:
    """Choose removals, cut, measure the cut model, and correct what was asked of the planner until it fits.

    Raises:
        BudgetUnreachableError: even removing every unit is predicted to be too slow.
    """
    budget = target.budget_ms(ready.original_ms)
    needed = ready.original_ms - budget * (1 - MARGIN)
    attempts: list[Attempt] = []
    for _ in range(MAX_PLANS):
        try:
            chosen = ready.settings.plan.choose(ready.options, needed, seed=ready.settings.seed)
        except BudgetUnreachableError as error:
            if attempts:
                break
            best = ready.original_ms - error.best_ms
            raise BudgetUnreachableError(_unreachable(ready, target, best), best) from None
        attempt = _try(ready, chosen)
        attempts.append(attempt)
        if attempt.measured_ms <= budget:
            break
        # The units saved less than they promised: ask for as much more as was missing, and a little.
        needed += (attempt.measured_ms - budget) * 1.1
    met = [attempt for attempt in attempts if attempt.measured_ms <= budget]
    best_attempt = min(met, key=lambda a: a.harm) if met else min(attempts, key=lambda a: a.measured_ms)
    actions = best_attempt.actions
    removals = tuple(Removal(unit, actions[unit.id]) for unit in ready.found.units if unit.id in actions)
    plan = Plan(removals, best_attempt.harm, ready.original_ms, budget, best_attempt.predicted_ms)
    return plan, attempts


def _unreachable(ready: Ready, target: Target, best_ms: float) -> str:
    return (
        f"the target must be reachable by removing blocks, but {target} is not: with all {len(ready.found.units)} "
        f"units removed {best_ms:.3g} of {ready.original_ms:.3g} ms remain; ask for --speedup "
        f"{max(1.01, math.floor(ready.original_ms / max(best_ms, 1e-9) * 95) / 100):.4g} or less"
    )


def _try(ready: Ready, chosen: Sequence[Option]) -> Attempt:
    actions = {option.unit: option.action for option in chosen}
    removals = [Removal(unit, actions[unit.id]) for unit in ready.found.units if unit.id in actions]
    cut = skeleton(ready.source, Block(), removals)
    rounds = compare(ready.source, cut, ready.batch, rounds=7, min_seconds=1.5)
    predicted = ready.original_ms - sum(option.saved_ms for option in chosen)
    measured = ready.original_ms / rounds.ratio("original", "compressed").median_ms
    return Attempt(predicted, measured, sum(max(0.0, option.harm) for option in chosen), actions)


def front(ready: Ready, shares: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)) -> list[dict[str, float]]:
    """Predicted harm over predicted latency: scores once, many targets."""
    rows = []
    for share in shares:
        needed = ready.original_ms * (1 - share)
        if needed > most_saved(ready.options):
            break
        chosen = ready.settings.plan.choose(ready.options, needed, seed=ready.settings.seed)
        rows.append(
            {
                "target": share,
                "predicted_ms": ready.original_ms - sum(o.saved_ms for o in chosen),
                "harm": sum(max(0.0, o.harm) for o in chosen),
                "n_removed": len(chosen),
            }
        )
    return rows
