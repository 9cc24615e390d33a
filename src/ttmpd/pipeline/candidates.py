"""From scores to the removals that save so many milliseconds: harms interact, so there are ways to it and back.

Units are scored anew on the way to the target (:func:`walk`). From there several plans are made, and judged as a whole
where the scorer does that (:func:`choose`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from ttmpd.errors import BudgetUnreachableError
from ttmpd.pipeline.analysis import Analysis, score_of, score_rows
from ttmpd.pipeline.stages import Stages
from ttmpd.plan.base import most_saved
from ttmpd.records import Action, DepthUnit, Option, Removal, Unit
from ttmpd.repair.sequential import repaired
from ttmpd.score.base import ScoringInputs
from ttmpd.surgery.find import holders_of

NARROW = (1.0, 1 / 3)
"""Plans are made with the harm of narrowed layers as it is and with a third of it, and compared as a whole: how much
less, or more, many of them do than their harms add up to differs from network to network."""
RESCORED_ON = 128
"""Samples to which the student is fitted on which units are scored anew."""
FEW_ROWS = 4096
"""Rows of each of these fits."""
MAX_TRIES = 5
"""How often more is asked for where stand-ins leave too little saved."""

Judge = Callable[[Sequence[Option]], float]
"""Harm of a whole plan."""


class Way(NamedTuple):
    """How a plan is made: so many times the harm of narrowed layers, with or without stand-ins."""

    narrow: float
    ends: bool


WAYS = tuple(Way(narrow, ends) for narrow in NARROW for ends in (True, False))


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

    def to(self, analysis: Analysis, needed_ms: float) -> tuple[Option, ...]:
        """The removals so far and the best further ones that together save ``needed_ms``."""
        rest = needed_ms - self.saved_ms
        if rest <= 0:
            return self.chosen
        return (*self.chosen, *analysis.settings.plan.choose(self.options, rest, seed=analysis.settings.seed))

    def with_narrow(self, factor: float) -> "Waypoint":
        """The same with so many times the harm where layers are narrowed further."""
        weighed = (replace(o, harm=factor * o.harm) if o.action == "narrow" else o for o in self.options)
        return Waypoint(self.chosen, tuple(weighed))

    def towards(self, analysis: Analysis, needed_ms: float, stride_ms: float) -> tuple[Option, ...]:
        """The removals so far, and of those that :meth:`to` would add the least harmful that save ``stride_ms``."""
        more = sorted(
            self.to(analysis, needed_ms)[len(self.chosen) :], key=lambda option: option.harm / option.saved_ms
        )
        saved = list(itertools.accumulate(option.saved_ms for option in more))
        n = next((i for i, ms in enumerate(saved, 1) if ms >= stride_ms), len(more))
        return (*self.chosen, *more[:n])


def walk(analysis: Analysis, needed_ms: float, stages: Stages) -> tuple[Waypoint, ...]:
    """Waypoints from nothing removed towards ``needed_ms``: harms interact, so units are scored anew along the way.

    After every ``plan.step`` of the original latency the least harmful part of the best plan for all of ``needed_ms``
    is replaced by repaired stand-ins, the nearest that closed forms come to the trained student, and the units that
    are left are scored on that student. One walk serves all targets up to its end; it is empty where nothing has to go.
    """
    if needed_ms <= 0:
        return ()
    found = [Waypoint((), analysis.options)]
    stride = analysis.settings.plan.step * analysis.original_ms
    while (here := found[-1]).saved_ms + stride < needed_ms - stride / 2:  # a short rest is not worth another scoring
        if most_saved(here.options) + here.saved_ms < needed_ms:
            break  # out of reach: choosing will say so
        chosen = here.towards(analysis, needed_ms, stride)
        rows = stages.json(f"rescore#{len(found)}", functools.partial(_rescored, analysis, chosen))
        found.append(Waypoint(chosen, analysis.options_of([score_of(row) for row in rows])))
    return tuple(found)


def _rescored(analysis: Analysis, chosen: Sequence[Option]) -> list[dict[str, Any]]:
    few, scope = analysis.calibration.fit.first(RESCORED_ON), analysis.settings.score.refit_scope
    student = repaired(
        analysis.teacher,
        analysis.removals(chosen),
        few,
        batch_size=analysis.pass_size,
        refit_scope=scope,
        rows=FEW_ROWS,
    )
    return score_rows(analysis, student, _left(analysis, chosen))


def _left(analysis: Analysis, chosen: Sequence[Option]) -> list[Unit]:
    """The units that can still go: not those that have gone, nor what they hold, nor what holds one of them."""
    gone = {option.unit_id for option in chosen}
    opened = {holder for option in chosen for holder in option.holders}
    holders = holders_of(analysis.found.units)
    return [u for u in analysis.found.units if u.id not in gone | opened and not gone.intersection(holders[u.id])]


def choose(
    analysis: Analysis,
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
        analysis: what is known.
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
        made = [_made(analysis, waypoints, point, needed_ms, way) for point in before[-2:]]
        if found := [plan for plan in made if plan]:
            plans[way] = min(found, key=total_harm)
    if not plans and tuple(ways) != WAYS:
        return choose(analysis, waypoints, needed_ms, harm_of)
    same = {way: frozenset((option.unit_id, option.action, option.kept) for option in plans[way]) for way in plans}
    some = {removed: way for way, removed in same.items()}
    if len(some) == 1:  # nothing to compare
        return plans[next(iter(plans))], tuple(plans)
    harms = {removed: (harm_of or total_harm)(plans[way]) for removed, way in some.items()}
    best = sorted(plans, key=lambda way: harms[same[way]])
    return plans[best[0]], tuple(best)


def _made(
    analysis: Analysis, waypoints: Sequence[Waypoint], point: Waypoint, needed_ms: float, way: Way
) -> tuple[Option, ...]:
    """The plan that a way leads to from a waypoint; () where its stand-ins leave too little to save."""
    point = point.with_narrow(way.narrow)
    if way.ends:
        return _with_stand_ins(analysis, waypoints, point, needed_ms)
    return tidied(analysis, waypoints, _along(analysis, point, needed_ms), ends=False)


def _with_stand_ins(
    analysis: Analysis, waypoints: Sequence[Waypoint], point: Waypoint, needed_ms: float
) -> tuple[Option, ...]:
    """The plan whose runs all end in a stand-in; () where that cannot save so much."""
    asked = needed_ms
    for _ in range(MAX_TRIES):
        plan = tidied(analysis, waypoints, _along(analysis, point, asked))
        missing = needed_ms - sum(option.saved_ms for option in plan)
        if missing <= 1e-9:
            return plan
        asked += missing
        if asked > most_saved(analysis.options):
            break
    return ()


def total_harm(chosen: Sequence[Option]) -> float:
    """The harms of the removals, added up."""
    return sum(max(0.0, option.harm) for option in chosen)


def _along(analysis: Analysis, point: Waypoint, needed_ms: float) -> tuple[Option, ...]:
    try:
        return point.to(analysis, needed_ms)
    except BudgetUnreachableError:
        # What was chosen on the way may stand in the way of the most that can be saved.
        return analysis.settings.plan.choose(analysis.options, needed_ms, seed=analysis.settings.seed)


def tidied(
    analysis: Analysis, waypoints: Sequence[Waypoint], chosen: Sequence[Option], *, ends: bool = True
) -> tuple[Option, ...]:
    """The same units with one linear stand-in at the end of every run of removed units, and none before it.

    The stand-in at the end is fitted to what the whole run did: the ones before it add milliseconds and repair hardly
    more, while a run without any leaves the student far from the teacher. With ``ends`` false the ends stay as they
    were chosen, too.
    """
    if not {"drop", "linear"} <= set(analysis.settings.actions):
        return tuple(chosen)
    known = {(o.unit_id, o.action): o for point in waypoints for o in (*point.options, *point.chosen)}
    gone = {option.unit_id for option in chosen if option.action != "narrow"}
    found = []
    for option in chosen:
        if option.action == "narrow":
            found.append(option)
            continue
        at_end = _ends_run(analysis, option.unit_id, gone)
        action: Action = "drop" if not at_end else "linear" if ends else option.action
        wanted = known.get((option.unit_id, action), option)
        found.append(wanted if wanted.saved_ms > 0 else option)
    return tuple(found)


def _ends_run(analysis: Analysis, unit: str, gone: Set[str]) -> bool:
    """Whether the unit that takes this one's output stays."""
    wholes = [other for other in analysis.found.units if isinstance(other, DepthUnit) and not other.branch]
    return not any(a.id == unit and b.id in gone and _adjacent(a, b) for a, b in itertools.pairwise(wholes))


def _adjacent(first: Unit, second: Unit) -> bool:
    """Whether one unit hands its output to the other: siblings of one shape, one after the other."""
    return first.shape == second.shape and first.path.rpartition(".")[0] == second.path.rpartition(".")[0]


def judge(analysis: Analysis) -> Judge | None:
    """What the scorer says of whole plans, each asked for once; None where it judges removals alone."""
    score, settings = analysis.settings.score, analysis.settings
    if not score.scores_plans:
        return None
    known: dict[tuple[Removal, ...], float] = {}

    def harm_of(chosen: Sequence[Option]) -> float:
        removals = analysis.removals(chosen)
        if removals not in known:
            job = ScoringInputs(
                analysis.teacher, (), analysis.calibration.fit, settings.actions, analysis.pass_size, settings.seed
            )
            known[removals] = score.score_plan(job, removals)
        return known[removals]

    return harm_of
