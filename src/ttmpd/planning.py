"""From a target to a plan that was measured: choose, cut, time the cut model, correct."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from ttmpd.errors import BudgetUnreachableError
from ttmpd.modules import count_macs
from ttmpd.plan.base import most_saved
from ttmpd.ready import Ready, score_of, score_rows
from ttmpd.records import Action, Option, Plan, Removal, Unit
from ttmpd.repair import repaired
from ttmpd.savings import compare, count_units, skeleton
from ttmpd.score.base import Job
from ttmpd.settings import Target
from ttmpd.stages import Stages
from ttmpd.surgery import whole_of

MAX_PLANS = 5
"""Rounds of planning, cutting and measuring before the best reachable is taken."""
FRONT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of the original latency for which the report shows what they would cost."""
MARGIN = 0.01
"""How much faster than asked a plan aims to be: medians measured minutes apart differ by about as much."""
SLACK = 0.03
"""How much slower than asked the first plan may be predicted: where units are few and large there may be none between
one that just misses and one that is far too fast, and the cut model is measured anyway."""
NARROW = (1.0, 1 / 3)
"""Plans are made with the harm of narrowed layers as it is and with a third of it, and compared as a whole: how much
less, or more, many of them do than their harms add up to differs from network to network."""
RESCORED_ON = 128
"""Samples to which the student is fitted on which units are scored anew."""
FEW_ROWS = 4096
"""Rows of each of these fits."""
TOLERANCE = 0.005
"""By how much a plan may miss in its measurement: what two measurements of one model differ by."""


Judge = Callable[[Sequence[Option]], float]
"""Harm of a whole plan."""


class Way(NamedTuple):
    """How a plan is made: so many times the harm of narrowed layers, with or without stand-ins."""

    narrow: float
    ends: bool


WAYS = tuple(Way(narrow, ends) for narrow in NARROW for ends in (True, False))
BEST_WAYS = (len(WAYS), 2, 1)
"""How many of the ways that were best are tried in the first round, in the second, and in those after."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One round of the planner: what was predicted, what the cut model measured."""

    predicted_ms: float
    measured_ms: float
    harm: float
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


@dataclasses.dataclass(frozen=True, slots=True)
class Waypoint:
    """A partial plan and what removing anything more would do from there.

    Args:
        chosen: the removals so far.
        options: every further removal, scored on the student so far.
    """

    chosen: tuple[Option, ...]
    options: tuple[Option, ...]

    @property
    def saved_ms(self) -> float:
        """What the removals so far save."""
        return sum(option.saved_ms for option in self.chosen)

    def to(self, ready: Ready, needed_ms: float) -> tuple[Option, ...]:
        """The removals so far and the best further ones that together save ``needed_ms``."""
        rest = needed_ms - self.saved_ms
        if rest <= 0:
            return self.chosen
        return (*self.chosen, *ready.settings.plan.choose(self.options, rest, seed=ready.settings.seed))

    def with_narrow(self, factor: float) -> "Waypoint":
        """The same with so many times the harm where layers are narrowed further."""
        weighed = (replace(o, harm=factor * o.harm) if o.action == "narrow" else o for o in self.options)
        return Waypoint(self.chosen, tuple(weighed))

    def towards(self, ready: Ready, needed_ms: float, stride_ms: float) -> tuple[Option, ...]:
        """The removals so far, and of those that :meth:`to` would add the least harmful that save ``stride_ms``."""
        more = sorted(self.to(ready, needed_ms)[len(self.chosen) :], key=lambda option: option.harm / option.saved_ms)
        saved = list(itertools.accumulate(option.saved_ms for option in more))
        n = next((i for i, ms in enumerate(saved, 1) if ms >= stride_ms), len(more))
        return (*self.chosen, *more[:n])


def walk(ready: Ready, needed_ms: float, stages: Stages) -> tuple[Waypoint, ...]:
    """Waypoints from nothing removed towards ``needed_ms``: harms interact, so units are scored anew along the way.

    After every ``plan.step`` of the original latency the least harmful part of the best plan for all of ``needed_ms``
    is replaced by repaired stand-ins, the nearest that closed forms come to the trained student, and the units that
    are left are scored on that student. One walk serves all targets up to its end.
    """
    found = [Waypoint((), ready.options)]
    stride = ready.settings.plan.step * ready.original_ms
    while (here := found[-1]).saved_ms + stride < needed_ms - stride / 2:  # a short rest is not worth another scoring
        if most_saved(here.options) + here.saved_ms < needed_ms:
            break  # out of reach: choosing will say so
        chosen = here.towards(ready, needed_ms, stride)
        rows = stages.json(f"rescore#{len(found)}", functools.partial(_rescored, ready, chosen))
        found.append(Waypoint(chosen, ready.options_of([score_of(row) for row in rows])))
    return tuple(found)


def _rescored(ready: Ready, chosen: Sequence[Option]) -> list[dict[str, Any]]:
    few, how = ready.samples.first(RESCORED_ON), ready.settings.score.repair
    student = repaired(ready.teacher, ready.removals(chosen), few, batch_size=ready.pass_size, how=how, rows=FEW_ROWS)
    return score_rows(ready, student, _left(ready, chosen))


def _left(ready: Ready, chosen: Sequence[Option]) -> list[Unit]:
    """The units that can still go: not those that have gone, nor their parts, nor the wholes of which a part has."""
    gone = {option.unit for option in chosen}
    opened = {option.whole for option in chosen}
    units = ready.found.units
    return [unit for unit in units if unit.id not in gone | opened and whole_of(unit, units) not in gone]


def choose(
    ready: Ready,
    waypoints: Sequence[Waypoint],
    needed_ms: float,
    harm_of: Judge | None = None,
    ways: Sequence[Way] = WAYS,
) -> tuple[tuple[Option, ...], tuple[Way, ...]]:
    """The plan for ``needed_ms`` that does least harm of those made in several ways, and the ways, best first.

    What was committed up to the last waypoint may leave a gap that only another large unit closes. Stand-ins take
    milliseconds, too, for which further units may have to go; where these are worth more than what the stand-ins
    repair, the plan stays without them.

    Args:
        ready: what is known.
        waypoints: see :func:`walk`.
        needed_ms: milliseconds that have to go.
        harm_of: judges whole plans; without it the harms of the removals are added up.
        ways: those to look at; all of them where these lead to no plan.

    Raises:
        BudgetUnreachableError: ``best_ms`` holds what all removals together would save.
    """
    before = [point for point in waypoints if point.saved_ms < needed_ms] or list(waypoints[:1])
    plans: dict[Way, tuple[Option, ...]] = {}
    for way in ways:
        if harm_of is None and way.narrow != NARROW[0]:
            continue
        made = [_made(ready, waypoints, point, needed_ms, way) for point in before[-2:]]
        if found := [plan for plan in made if plan]:
            plans[way] = min(found, key=_total)
    if not plans and tuple(ways) != WAYS:
        return choose(ready, waypoints, needed_ms, harm_of)
    same = {way: frozenset((option.unit, option.action, option.kept) for option in plans[way]) for way in plans}
    some = {removed: way for way, removed in same.items()}
    harms = {removed: (harm_of or _total)(plans[way]) for removed, way in some.items()}
    best = sorted(plans, key=lambda way: harms[same[way]])
    return plans[best[0]], tuple(best)


def _made(
    ready: Ready, waypoints: Sequence[Waypoint], point: Waypoint, needed_ms: float, way: Way
) -> tuple[Option, ...]:
    """The plan that a way leads to from a waypoint; () where its stand-ins leave too little to save."""
    point = point.with_narrow(way.narrow)
    if way.ends:
        return _with_stand_ins(ready, waypoints, point, needed_ms)
    return tidied(ready, waypoints, _along(ready, point, needed_ms), ends=False)


def _with_stand_ins(
    ready: Ready, waypoints: Sequence[Waypoint], point: Waypoint, needed_ms: float
) -> tuple[Option, ...]:
    """The plan whose runs all end in a stand-in; () where that cannot save so much."""
    asked = needed_ms
    for _ in range(MAX_PLANS):
        plan = tidied(ready, waypoints, _along(ready, point, asked))
        missing = needed_ms - sum(option.saved_ms for option in plan)
        if missing <= 1e-9:
            return plan
        asked += missing
        if asked > most_saved(ready.options):
            break
    return ()


def _total(chosen: Sequence[Option]) -> float:
    return sum(max(0.0, option.harm) for option in chosen)


def _along(ready: Ready, point: Waypoint, needed_ms: float) -> tuple[Option, ...]:
    try:
        return point.to(ready, needed_ms)
    except BudgetUnreachableError:
        # What was chosen on the way may stand in the way of the most that can be saved.
        return ready.settings.plan.choose(ready.options, needed_ms, seed=ready.settings.seed)


def tidied(
    ready: Ready, waypoints: Sequence[Waypoint], chosen: Sequence[Option], *, ends: bool = True
) -> tuple[Option, ...]:
    """The same units with one linear stand-in at the end of every run of removed units, and none before it.

    The stand-in at the end is fitted to what the whole run did: the ones before it add milliseconds and repair hardly
    more, while a run without any leaves the student far from the teacher. A 3x3 stand-in widens what the run sees and
    stays where it was chosen. With ``ends`` false the ends stay as they were chosen, too.
    """
    if not {"drop", "linear"} <= set(ready.settings.actions):
        return tuple(chosen)
    known = {(o.unit, o.action): o for point in waypoints for o in (*point.options, *point.chosen)}
    gone = {option.unit for option in chosen if option.action != "narrow"}
    found = []
    for option in chosen:
        if option.action == "narrow":
            found.append(option)
            continue
        at_end = _ends_run(ready, option.unit, gone)
        action: Action = "drop" if not at_end else "linear" if ends else option.action
        wanted = known.get((option.unit, action), option)
        found.append(wanted if wanted.saved_ms > 0 and option.action != "conv" else option)
    return tuple(found)


def _ends_run(ready: Ready, unit: str, gone: Set[str]) -> bool:
    """Whether the unit that takes this one's output stays."""
    wholes = [other for other in ready.found.units if other.kind == "block"]
    return not any(a.id == unit and b.id in gone and _adjacent(a, b) for a, b in itertools.pairwise(wholes))


def _adjacent(first: Unit, second: Unit) -> bool:
    """Whether one unit hands its output to the other: siblings of one shape, one after the other."""
    return first.shape == second.shape and first.path.rpartition(".")[0] == second.path.rpartition(".")[0]


def needed_ms(ready: Ready, target: Target) -> float:
    """Milliseconds that have to go by the first plan: all but the slack, and never less than half.

    What is lossless is taken already; where that alone is enough, this is not positive.
    """
    if target.macs is not None:
        return 0.0
    budget = target.budget_ms(ready.original_ms)
    return max(ready.lossless_ms - budget * (1 + SLACK), (ready.lossless_ms - budget) / 2)


def make_plan(ready: Ready, waypoints: Sequence[Waypoint], target: Target) -> Planned:
    """Choose removals, cut, measure the cut model, and correct what was asked of the planner until it fits.

    Raises:
        BudgetUnreachableError: even removing every unit is predicted to be too slow.
    """
    if target.macs is not None:
        return _plan_by_macs(ready, target, target.macs)
    budget, needed = target.budget_ms(ready.original_ms), needed_ms(ready, target)
    limit = budget * (1 + TOLERANCE)
    too_little, enough = 0.0, math.inf
    attempts: list[Attempt] = []
    harm_of, ways = judge(ready), WAYS
    if needed <= 0:
        attempts.append(_try(ready, (), 0.0))
        needed = 0.0 if attempts[0].measured_ms <= limit else max(MARGIN * budget, attempts[0].measured_ms - budget)
    while needed > 0 and len(attempts) < MAX_PLANS:
        try:
            few = ways[: BEST_WAYS[min(len(attempts), len(BEST_WAYS) - 1)]]
            chosen, ways = choose(ready, waypoints, needed, harm_of, few)
        except BudgetUnreachableError as error:
            if attempts:
                break
            best = ready.lossless_ms - error.best_ms
            raise BudgetUnreachableError(_unreachable(ready, target, best), best) from None
        if any(attempt.removals == ready.removals(chosen) for attempt in attempts):
            break  # what is asked differs, the plan does not
        attempt = _try(ready, chosen, (harm_of or _total)(chosen))
        attempts.append(attempt)
        promised = ready.lossless_ms - attempt.predicted_ms
        # The units saved less or more than they promised: ask for what was missing, or give back what was too much.
        if attempt.measured_ms > limit:
            too_little = max(too_little, needed, promised)
            needed = too_little + max((attempt.measured_ms - budget) * 1.1, MARGIN * budget / 2)
        else:
            enough = min(enough, needed)
            if attempt.measured_ms > budget * (1 - 2 * MARGIN):
                break
            needed -= budget * (1 - MARGIN) - attempt.measured_ms
        if not too_little < needed < enough:
            needed = (too_little + enough) / 2
    met = [attempt for attempt in attempts if attempt.measured_ms <= limit]
    best_attempt = min(met, key=lambda a: a.harm) if met else min(attempts, key=lambda a: a.measured_ms)
    plan = Plan(best_attempt.removals, best_attempt.harm, ready.original_ms, budget, best_attempt.predicted_ms)
    return Planned(target, plan, tuple(attempts), front(ready, waypoints))


def _plan_by_macs(ready: Ready, target: Target, share: float) -> Planned:
    """The least harmful removals that leave ``share`` of the multiply-accumulates, which are counted, not measured.

    Scores are taken as independent: this is how published budgets are met. No latency is to be reached, so none is
    measured here: the plan holds the predicted milliseconds, and there are no attempts.
    """
    few = ready.batch[:2]
    total = count_macs(ready.source, few)[""] / 1e6
    counted = dataclasses.replace(ready, timings=count_units(ready.found.units), original_ms=total)
    needed, chosen = total * (1 - share), tuple[Option, ...]()
    for _ in range(MAX_PLANS):
        try:
            chosen = ready.settings.plan.choose(counted.options, needed, seed=ready.settings.seed)
        except BudgetUnreachableError as error:
            best = 1 - error.best_ms / total
            raise BudgetUnreachableError(
                f"the target must be reachable by removing units, but {target} is not: with all of them gone "
                f"{best:.3g} remain; ask for more",
                best,
            ) from None
        left = count_macs(skeleton(ready.source, ready.removals(chosen)), few)[""] / 1e6
        if left <= share * total * (1 + TOLERANCE):
            break
        needed += left - share * total
    predicted = ready.lossless_ms - sum(option.saved_ms for option in _in_ms(ready, chosen))
    plan = Plan(ready.removals(chosen), _total(chosen), ready.original_ms, predicted, predicted)
    return Planned(target, plan, ())


def _in_ms(ready: Ready, chosen: Sequence[Option]) -> list[Option]:
    """The chosen options as they are in milliseconds."""
    wanted = {(option.unit, option.action, option.kept) for option in chosen}
    return [option for option in ready.options if (option.unit, option.action, option.kept) in wanted]


def _unreachable(ready: Ready, target: Target, best_ms: float) -> str:
    return (
        f"the target must be reachable by removing units, but {target} is not: with all {len(ready.found.units)} "
        f"units removed {best_ms:.3g} of {ready.original_ms:.3g} ms remain; ask for --speedup "
        f"{max(1.01, math.floor(ready.original_ms / max(best_ms, 1e-9) * 95) / 100):.4g} or less"
    )


def judge(ready: Ready) -> Judge | None:
    """What the scorer says of whole plans, each asked for once; None where it judges removals alone."""
    score, settings = ready.settings.score, ready.settings
    if not score.judges_plans:
        return None
    known: dict[tuple[Removal, ...], float] = {}

    def harm_of(chosen: Sequence[Option]) -> float:
        removals = ready.removals(chosen)
        if removals not in known:
            job = Job(ready.teacher, (), ready.samples, settings.actions, ready.pass_size, settings.seed)
            known[removals] = score.of_plan(job, removals)
        return known[removals]

    return harm_of


def _try(ready: Ready, chosen: Sequence[Option], harm: float) -> Attempt:
    removals = ready.removals(chosen)
    cut = skeleton(ready.source, removals, ready.lossless)
    rounds = compare(ready.source, cut, ready.batch, rounds=15, min_seconds=3.0, max_seconds=8.0)
    predicted = ready.lossless_ms - sum(option.saved_ms for option in chosen)
    measured = ready.original_ms / rounds.ratio("original", "compressed").median_ms
    return Attempt(predicted, measured, harm, removals)


def front(ready: Ready, waypoints: Sequence[Waypoint]) -> tuple[dict[str, float], ...]:
    """Predicted harm over predicted latency: scores once, many targets."""
    rows = []
    for share in FRONT:
        try:
            needed = ready.lossless_ms - ready.original_ms * share
            chosen = choose(ready, waypoints, needed)[0] if needed > 0 else ()
        except BudgetUnreachableError:
            break
        rows.append(
            {
                "target": share,
                "predicted_ms": ready.lossless_ms - sum(o.saved_ms for o in chosen),
                "harm": sum(max(0.0, o.harm) for o in chosen),
                "n_removed": len(chosen),
            }
        )
    return tuple(rows)
