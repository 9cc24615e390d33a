"""From a target to a plan that was measured: choose, cut, time the cut model, correct."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ttmpd.errors import BudgetUnreachableError
from ttmpd.latency.table import PRECISION, compare, count_units
from ttmpd.models.macs import count_macs
from ttmpd.pipeline.analysis import Analysis, scores_of
from ttmpd.pipeline.candidates import (
    VARIANTS,
    Judge,
    PartialPlan,
    best_plan,
    nothing_removed,
    plan_judge,
    total_harm,
)
from ttmpd.pipeline.settings import Settings, Target
from ttmpd.pipeline.stages import Stages
from ttmpd.records import Option, Plan, Removal, Score, Unit
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
VARIANTS_PER_ROUND = (len(VARIANTS), 2, 1)
"""How many of the variants that were best are tried in the first round, in the second, and in those after."""
TOLERANCE = 0.005
"""By how much a plan may miss in its measurement: what two measurements of one model differ by."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One round of the planner: what was predicted, what the cut model measured, and the standard error of that."""

    predicted_ms: float
    measured_ms: float
    error_ms: float
    removals: tuple[Removal, ...]

    def pooled(self, again: "Attempt") -> "Attempt":
        """The attempt with the mean of two measurements of its plan, each weighted by how well it is known.

        Example:
            >>> Attempt(8.0, 10.0, 0.1, ()).pooled(Attempt(8.0, 11.0, 0.1, ())).measured_ms
            10.5
        """
        first, second = (1 / max(attempt.error_ms, 1e-9) ** 2 for attempt in (self, again))
        mean = (first * self.measured_ms + second * again.measured_ms) / (first + second)
        return dataclasses.replace(self, measured_ms=mean, error_ms=(first + second) ** -0.5)


@dataclasses.dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """A plan with how it came about.

    Args:
        target: what was asked for.
        plan: what is removed.
        attempts: the planner's rounds; none for a share of the MACs, which is counted.
        pareto_front: predicted harm over predicted latency for other targets.
    """

    target: Target
    plan: Plan
    attempts: tuple[Attempt, ...]
    pareto_front: tuple[dict[str, float], ...] = ()


def needed_ms(analysis: Analysis, target: Target) -> float:
    """Milliseconds that have to go by the first plan: all but the slack, and never less than half.

    What is lossless is taken already; where that alone is enough, this is not positive.
    """
    if target.macs is not None:
        return 0.0
    budget = target.budget_ms(analysis.original_ms)
    return max(analysis.lossless_ms - budget * (1 + SLACK), (analysis.lossless_ms - budget) / 2)


def make_plan(
    analysis: Analysis, path: Sequence[PartialPlan], target: Target, *, settings: Settings, stages: Stages
) -> MeasuredPlan:
    """Choose removals, cut, measure the cut model, and correct what was asked of the planner until it fits.

    Args:
        analysis: of the model.
        path: see :func:`ttmpd.pipeline.candidates.rescored_path`; empty where nothing has to go.
        target: to reach.
        settings: of the run.
        stages: where scores are kept.

    Raises:
        BudgetUnreachableError: even removing every unit is predicted to be too slow.
    """
    if target.macs is not None:
        return _plan_by_macs(analysis, target, target.macs, scores_of(analysis, settings, stages), settings)
    search = _Bisection(target.budget_ms(analysis.original_ms), needed_ms(analysis, target))
    harm_of = plan_judge(analysis, settings)
    attempts: dict[Attempt, tuple[Option, ...]] = {}
    if search.needed_ms <= 0:
        unpruned = measure_plan(analysis, (), settings)
        attempts[unpruned] = ()
        search.begin(unpruned)
    if search.needed_ms > 0:
        path = path or (nothing_removed(analysis, settings, stages),)
        try:
            _search(search, attempts, analysis, path, settings=settings, harm_of=harm_of)
        except BudgetUnreachableError as error:
            best_ms = analysis.lossless_ms - error.best_ms
            raise BudgetUnreachableError(unreachable(analysis, target, best_ms), best_ms) from None
    best, harm = _confirmed(attempts, search.limit_ms, harm_of, analysis, settings)
    plan = Plan(best.removals, harm, analysis.original_ms, search.budget_ms, best.predicted_ms)
    front = pareto_front(analysis, path, settings) if plan.removals else ()
    return MeasuredPlan(target, plan, tuple(attempts), front)


@dataclasses.dataclass(slots=True)
class _Bisection:
    """How much the next plan is to save, between what was too little and what was enough.

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

    def begin(self, unpruned: Attempt) -> None:
        """Start from the model with nothing removed: where it meets the budget, no plan is needed."""
        missing = unpruned.measured_ms - self.budget_ms
        self.needed_ms = 0.0 if unpruned.measured_ms <= self.limit_ms else max(MARGIN * self.budget_ms, missing)

    def update(self, attempt: Attempt, promised_ms: float) -> bool:
        """Units save less or more than they promise: ask for what was missing, or give back what was too much.

        Returns:
            True when another plan is worth trying.
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


def _search(
    search: _Bisection,
    attempts: dict[Attempt, tuple[Option, ...]],
    analysis: Analysis,
    path: Sequence[PartialPlan],
    *,
    settings: Settings,
    harm_of: Judge | None,
) -> None:
    """Measure plans until one fits, and note them in ``attempts``.

    Raises:
        BudgetUnreachableError: no plan saves enough, and none was measured before; ``best_ms`` is what all would save.
    """
    variants = VARIANTS
    while len(attempts) < MAX_PLANS:
        promising = variants[: VARIANTS_PER_ROUND[min(len(attempts), len(VARIANTS_PER_ROUND) - 1)]]
        try:
            chosen, variants = best_plan(
                path, search.needed_ms, units=analysis.units, settings=settings, harm_of=harm_of, variants=promising
            )
        except BudgetUnreachableError:
            if attempts:
                return
            raise
        if any(attempt.removals == analysis.removals(chosen) for attempt in attempts):
            return  # what is asked differs, the plan does not
        attempt = measure_plan(analysis, chosen, settings)
        attempts[attempt] = chosen
        if not search.update(attempt, analysis.lossless_ms - attempt.predicted_ms) or search.needed_ms <= 0:
            return


def _confirmed(
    attempts: dict[Attempt, tuple[Option, ...]],
    limit_ms: float,
    harm_of: Judge | None,
    analysis: Analysis,
    settings: Settings,
) -> tuple[Attempt, float]:
    """The best plan once it was measured again, both measurements pooled; another one where it then misses.

    Of several plans that were measured once the one is chosen that noise was kind to.
    """
    confirmed: set[Attempt] = set()
    while True:
        best, harm = _best(attempts, limit_ms, harm_of)
        if best in confirmed or not best.removals:
            return best, harm
        pooled = best.pooled(measure_plan(analysis, attempts[best], settings))
        renewed = {pooled if attempt is best else attempt: chosen for attempt, chosen in attempts.items()}
        attempts.clear()
        attempts.update(renewed)
        confirmed.add(pooled)


def _best(
    attempts: Mapping[Attempt, Sequence[Option]], limit_ms: float, harm_of: Judge | None
) -> tuple[Attempt, float]:
    """The least harmful plan that is fast enough, else the fastest, with its harm; no others are judged here."""
    met = [attempt for attempt in attempts if attempt.measured_ms <= limit_ms]
    eligible = met or [min(attempts, key=lambda attempt: attempt.measured_ms)]
    harms = {attempt: (harm_of or total_harm)(attempts[attempt]) if attempts[attempt] else 0.0 for attempt in eligible}
    best = min(harms, key=harms.__getitem__)
    return best, harms[best]


def _plan_by_macs(
    analysis: Analysis, target: Target, share: float, scores: Sequence[Score], settings: Settings
) -> MeasuredPlan:
    """The least harmful removals that leave ``share`` of the multiply-accumulates, which are counted, not measured.

    Scores are taken as independent: this is how published budgets are met. No latency is to be reached, so none is
    measured here: the plan holds the predicted milliseconds, and there are no attempts.
    """
    pair = analysis.batch[:2]
    total = count_macs(analysis.source, pair)[""] / 1e6
    counted = dataclasses.replace(analysis, latencies=count_units(_units_on(analysis, pair)))
    options = counted.options(scores, settings.actions)
    needed, chosen = total * (1 - share), tuple[Option, ...]()
    for _ in range(MAX_PLANS):
        try:
            chosen = settings.plan.choose(options, needed, seed=settings.seed)
        except BudgetUnreachableError as error:
            best = 1 - error.best_ms / total
            raise BudgetUnreachableError(
                f"the target must be reachable by removing units, but {target} is not: with all of them gone "
                f"{best:.3g} remain; ask for more",
                best,
            ) from None
        left = count_macs(skeleton(analysis.source, analysis.removals(chosen)), pair)[""] / 1e6
        if left <= share * total * (1 + TOLERANCE):
            break
        needed += left - share * total
    timed = _same_removals(analysis.options(scores, settings.actions), chosen)
    predicted = analysis.lossless_ms - sum(option.saved_ms for option in timed)
    plan = Plan(analysis.removals(chosen), total_harm(chosen), analysis.original_ms, predicted, predicted)
    return MeasuredPlan(target, plan, ())


def _units_on(analysis: Analysis, batch: Tensor) -> list[Unit]:
    """The units with their operations on a batch: its texts may be shorter than those they were found on."""
    if not analysis.calibration.fit.is_text:
        return list(analysis.units)
    kinds = list(dict.fromkeys(unit.kind for unit in analysis.units))
    by_id = {unit.id: unit for unit in find_units(analysis.source, batch, kinds).units}
    return [by_id.get(unit.id, unit) for unit in analysis.units]


def _same_removals(options: Sequence[Option], chosen: Sequence[Option]) -> list[Option]:
    """Those of the options that remove what the chosen ones do, whatever they are said to save."""
    removed = {(option.unit_id, option.action, option.kept) for option in chosen}
    return [option for option in options if (option.unit_id, option.action, option.kept) in removed]


def unreachable(analysis: Analysis, target: Target, best_ms: float) -> str:
    """Says that a target is out of reach, and what is not, given the milliseconds with everything removed."""
    return (
        f"the target must be reachable by removing units, but {target} is not: with all {len(analysis.units)} "
        f"units removed {best_ms:.3g} of {analysis.original_ms:.3g} ms remain; ask for --speedup "
        f"{max(1.01, math.floor(analysis.original_ms / max(best_ms, 1e-9) * 95) / 100):.4g} or less"
    )


def measure_plan(
    analysis: Analysis,
    chosen: Sequence[Option],
    settings: Settings,
    *,
    seconds: tuple[float, float] = (2.0, 4.0),
    precision: float = PRECISION,
) -> Attempt:
    """Cut the model by the chosen options and time it.

    Args:
        analysis: of the model.
        chosen: what is removed.
        settings: of the run.
        seconds: least and most of the counted rounds together.
        precision: see :func:`ttmpd.latency.table.compare`.
    """
    removals = analysis.removals(chosen)
    timings = compare(
        analysis.source,
        skeleton(analysis.source, removals, analysis.lossless),
        analysis.batch,
        runtime=settings.runtime,
        rounds=15,
        min_seconds=seconds[0],
        max_seconds=seconds[1],
        precision=precision,
    )
    ratio = timings.ratio("original", "compressed")
    predicted = analysis.lossless_ms - sum(option.saved_ms for option in chosen)
    measured = analysis.original_ms / ratio.median_ms
    return Attempt(predicted, measured, measured * ratio.error_ms / ratio.median_ms, removals)


def pareto_front(analysis: Analysis, path: Sequence[PartialPlan], settings: Settings) -> tuple[dict[str, float], ...]:
    """Predicted harm over predicted latency: scores once, many targets."""
    rows = []
    for share in FRONT:
        needed = analysis.lossless_ms - analysis.original_ms * share
        try:
            chosen = best_plan(path, needed, units=analysis.units, settings=settings)[0] if needed > 0 else ()
        except BudgetUnreachableError:
            break
        rows.append(
            {
                "target": share,
                "predicted_ms": analysis.lossless_ms - sum(option.saved_ms for option in chosen),
                "harm": total_harm(chosen),
                "n_removed": len(chosen),
            }
        )
    return tuple(rows)
