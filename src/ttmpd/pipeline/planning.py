"""From a target to a plan that was measured: choose, cut, time the cut model, correct."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ttmpd.errors import BudgetUnreachableError
from ttmpd.latency.table import compare, count_units
from ttmpd.models.macs import count_macs
from ttmpd.pipeline.analysis import Analysis
from ttmpd.pipeline.candidates import WAYS, Judge, Waypoint, choose, judge, total_harm
from ttmpd.pipeline.settings import Target
from ttmpd.records import Option, Plan, Removal, Unit
from ttmpd.surgery.cut import skeleton
from ttmpd.surgery.find import find_units

MAX_PLANS = 5
"""Timings of planning, cutting and measuring before the best reachable is taken."""
FRONT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of the original latency for which the report shows what they would cost."""
MARGIN = 0.01
"""How much faster than asked a plan aims to be: medians measured minutes apart differ by about as much."""
SLACK = 0.03
"""How much slower than asked the first plan may be predicted: where units are few and large there may be none between
one that just misses and one that is far too fast, and the cut model is measured anyway."""
BEST_WAYS = (len(WAYS), 2, 1)
"""How many of the ways that were best are tried in the first round, in the second, and in those after."""
TOLERANCE = 0.005
"""By how much a plan may miss in its measurement: what two measurements of one model differ by."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One round of the planner: what was predicted, what the cut model measured, and how sure that is."""

    predicted_ms: float
    measured_ms: float
    error_ms: float
    removals: tuple[Removal, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """A plan with how it came about.

    Args:
        target: what was asked for.
        plan: what is removed.
        attempts: the planner's rounds; none for a share of the MACs, which is counted.
        front: predicted harm over predicted latency for other targets.
    """

    target: Target
    plan: Plan
    attempts: tuple[Attempt, ...]
    front: tuple[dict[str, float], ...] = ()


def needed_ms(analysis: Analysis, target: Target) -> float:
    """Milliseconds that have to go by the first plan: all but the slack, and never less than half.

    What is lossless is taken already; where that alone is enough, this is not positive.
    """
    if target.macs is not None:
        return 0.0
    budget = target.budget_ms(analysis.original_ms)
    return max(analysis.lossless_ms - budget * (1 + SLACK), (analysis.lossless_ms - budget) / 2)


def make_plan(analysis: Analysis, waypoints: Sequence[Waypoint], target: Target) -> Planned:
    """Choose removals, cut, measure the cut model, and correct what was asked of the planner until it fits.

    Raises:
        BudgetUnreachableError: even removing every unit is predicted to be too slow.
    """
    if target.macs is not None:
        return _plan_by_macs(analysis, target, target.macs)
    ask = _Ask(target.budget_ms(analysis.original_ms), needed_ms(analysis, target))
    tried: dict[Attempt, tuple[Option, ...]] = {}
    harm_of, ways = judge(analysis), WAYS
    if ask.needed_ms <= 0:
        attempt = _try(analysis, ())
        tried[attempt] = ()
        missing = attempt.measured_ms - ask.budget_ms
        ask.needed_ms = 0.0 if attempt.measured_ms <= ask.limit_ms else max(MARGIN * ask.budget_ms, missing)
    if ask.needed_ms > 0 and not waypoints:
        waypoints = (Waypoint((), analysis.options),)
    while ask.needed_ms > 0 and len(tried) < MAX_PLANS:
        try:
            few = ways[: BEST_WAYS[min(len(tried), len(BEST_WAYS) - 1)]]
            chosen, ways = choose(analysis, waypoints, ask.needed_ms, harm_of, few)
        except BudgetUnreachableError as error:
            if tried:
                break
            best_ms = analysis.lossless_ms - error.best_ms
            raise BudgetUnreachableError(_unreachable(analysis, target, best_ms), best_ms) from None
        if any(attempt.removals == analysis.removals(chosen) for attempt in tried):
            break  # what is asked differs, the plan does not
        attempt = _try(analysis, chosen)
        tried[attempt] = chosen
        if not ask.learn(attempt, analysis.lossless_ms - attempt.predicted_ms):
            break
    best, harm = _best(tried, ask.limit_ms, harm_of)
    plan = Plan(best.removals, harm, analysis.original_ms, ask.budget_ms, best.predicted_ms)
    return Planned(target, plan, tuple(tried), front(analysis, waypoints) if plan.removals else ())


@dataclasses.dataclass(slots=True)
class _Ask:
    """What is asked of the planner, between what was too little and what was enough.

    Args:
        budget_ms: of the student.
        needed_ms: that the next plan is to save.
    """

    budget_ms: float
    needed_ms: float
    too_little: float = 0.0
    enough: float = math.inf

    @property
    def limit_ms(self) -> float:
        """Milliseconds with which the budget is met."""
        return self.budget_ms * (1 + TOLERANCE)

    def learn(self, attempt: Attempt, promised_ms: float) -> bool:
        """Units save less or more than they promise: ask for what was missing, or give back what was too much.

        Returns:
            Whether there is reason to go on.
        """
        if attempt.measured_ms > self.limit_ms:
            self.too_little = max(self.too_little, self.needed_ms, promised_ms)
            missing = (attempt.measured_ms - self.budget_ms) * 1.1
            self.needed_ms = self.too_little + max(missing, MARGIN * self.budget_ms / 2)
        else:
            self.enough = min(self.enough, self.needed_ms)
            if attempt.measured_ms + 2 * attempt.error_ms > self.budget_ms * (1 - 2 * MARGIN):
                return False  # not known to be faster than it has to be
            self.needed_ms -= self.budget_ms * (1 - MARGIN) - attempt.measured_ms
        if not self.too_little < self.needed_ms < self.enough:
            self.needed_ms = (self.too_little + self.enough) / 2
        return True


def _best(tried: Mapping[Attempt, Sequence[Option]], limit_ms: float, harm_of: Judge | None) -> tuple[Attempt, float]:
    """The least harmful plan that is fast enough, else the fastest, with its harm; no others are judged here."""
    met = [attempt for attempt in tried if attempt.measured_ms <= limit_ms]
    few = met or [min(tried, key=lambda attempt: attempt.measured_ms)]
    harms = {attempt: (harm_of or total_harm)(tried[attempt]) if tried[attempt] else 0.0 for attempt in few}
    best = min(harms, key=harms.__getitem__)
    return best, harms[best]


def _plan_by_macs(analysis: Analysis, target: Target, share: float) -> Planned:
    """The least harmful removals that leave ``share`` of the multiply-accumulates, which are counted, not measured.

    Scores are taken as independent: this is how published budgets are met. No latency is to be reached, so none is
    measured here: the plan holds the predicted milliseconds, and there are no attempts.
    """
    few = analysis.batch[:2]
    total = count_macs(analysis.source, few)[""] / 1e6
    counted = dataclasses.replace(analysis, timings=count_units(_units_on(analysis, few)), original_ms=total)
    options = counted.options_of(analysis.scores)
    needed, chosen = total * (1 - share), tuple[Option, ...]()
    for _ in range(MAX_PLANS):
        try:
            chosen = analysis.settings.plan.choose(options, needed, seed=analysis.settings.seed)
        except BudgetUnreachableError as error:
            best = 1 - error.best_ms / total
            raise BudgetUnreachableError(
                f"the target must be reachable by removing units, but {target} is not: with all of them gone "
                f"{best:.3g} remain; ask for more",
                best,
            ) from None
        left = count_macs(skeleton(analysis.source, analysis.removals(chosen)), few)[""] / 1e6
        if left <= share * total * (1 + TOLERANCE):
            break
        needed += left - share * total
    predicted = analysis.lossless_ms - sum(option.saved_ms for option in _in_ms(analysis, chosen))
    plan = Plan(analysis.removals(chosen), total_harm(chosen), analysis.original_ms, predicted, predicted)
    return Planned(target, plan, ())


def _units_on(analysis: Analysis, few: Tensor) -> list[Unit]:
    """The units with their operations on these samples: texts may be shorter than those they were found on."""
    if not analysis.calibration.fit.is_text:
        return list(analysis.found.units)
    kinds = list(dict.fromkeys(unit.kind for unit in analysis.found.units))
    here = {unit.id: unit for unit in find_units(analysis.source, few, kinds).units}
    return [here.get(unit.id, unit) for unit in analysis.found.units]


def _in_ms(analysis: Analysis, chosen: Sequence[Option]) -> list[Option]:
    """The chosen options as they are in milliseconds."""
    wanted = {(option.unit_id, option.action, option.kept) for option in chosen}
    return [option for option in analysis.options if (option.unit_id, option.action, option.kept) in wanted]


def _unreachable(analysis: Analysis, target: Target, best_ms: float) -> str:
    return (
        f"the target must be reachable by removing units, but {target} is not: with all {len(analysis.found.units)} "
        f"units removed {best_ms:.3g} of {analysis.original_ms:.3g} ms remain; ask for --speedup "
        f"{max(1.01, math.floor(analysis.original_ms / max(best_ms, 1e-9) * 95) / 100):.4g} or less"
    )


def _try(analysis: Analysis, chosen: Sequence[Option]) -> Attempt:
    removals = analysis.removals(chosen)
    cut = skeleton(analysis.source, removals, analysis.lossless)
    runtime = analysis.settings.runtime
    timings = compare(
        analysis.source, cut, analysis.batch, runtime=runtime, rounds=15, min_seconds=3.0, max_seconds=6.0
    )
    ratio = timings.ratio("original", "compressed")
    predicted = analysis.lossless_ms - sum(option.saved_ms for option in chosen)
    measured = analysis.original_ms / ratio.median_ms
    return Attempt(predicted, measured, measured * ratio.error_ms / ratio.median_ms, removals)


def front(analysis: Analysis, waypoints: Sequence[Waypoint]) -> tuple[dict[str, float], ...]:
    """Predicted harm over predicted latency: scores once, many targets."""
    rows = []
    for share in FRONT:
        try:
            needed = analysis.lossless_ms - analysis.original_ms * share
            chosen = choose(analysis, waypoints, needed)[0] if needed > 0 else ()
        except BudgetUnreachableError:
            break
        rows.append(
            {
                "target": share,
                "predicted_ms": analysis.lossless_ms - sum(o.saved_ms for o in chosen),
                "harm": sum(max(0.0, o.harm) for o in chosen),
                "n_removed": len(chosen),
            }
        )
    return tuple(rows)
