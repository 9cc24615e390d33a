"""From scores to the removals that save so many milliseconds.

Harms interact, so units are scored anew on the way to the target (:func:`rescored_path`). From its last partial plans
several plans are made, and compared as a whole where the scorer does that (:func:`best_plan`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from ttmpd.errors import BudgetUnreachableError
from ttmpd.pipeline.analysis import Analysis, score_of, score_rows, scores_of
from ttmpd.pipeline.settings import Settings
from ttmpd.pipeline.stages import Stages
from ttmpd.plan.base import most_saved
from ttmpd.records import Action, DepthUnit, Option, Removal, Unit
from ttmpd.repair.sequential import repaired
from ttmpd.score.base import ScoringInputs
from ttmpd.surgery.find import holders_of

NARROW = (1.0, 1 / 3)
"""Plans are made with the harm of narrowed layers as it is and with a third of it, and compared as a whole: how much
less, or more, many of them do than their harms add up to differs from network to network."""
RESCORED_SAMPLES = 128
"""Samples to which the student is fitted on which units are scored anew."""
RESCORED_ROWS = 4096
"""Rows of each of these fits."""
MAX_TRIES = 5
"""How often more is asked for where replacements leave too little saved."""

Judge = Callable[[Sequence[Option]], float]
"""Harm of a whole plan."""


class Variant(NamedTuple):
    """How a plan is made: the factor on the harm of narrowed layers, and whether runs end in a replacement."""

    narrow: float
    end_replacements: bool


VARIANTS = tuple(Variant(narrow, ends) for narrow in NARROW for ends in (True, False))


@dataclasses.dataclass(frozen=True, slots=True)
class PartialPlan:
    """Removals that are decided, and what removing anything more would do from there.

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

    def complete(self, needed_ms: float, settings: Settings) -> tuple[Option, ...]:
        """The removals so far and the best further ones that together save ``needed_ms``."""
        missing_ms = needed_ms - self.saved_ms
        if missing_ms <= 0:
            return self.chosen
        return (*self.chosen, *settings.plan.choose(self.options, missing_ms, seed=settings.seed))

    def with_narrow(self, factor: float) -> "PartialPlan":
        """A copy in which the harm of narrowing is multiplied by ``factor``."""
        options = (
            dataclasses.replace(option, harm=factor * option.harm) if option.action == "narrow" else option
            for option in self.options
        )
        return PartialPlan(self.chosen, tuple(options))

    def extend(self, needed_ms: float, stride_ms: float, settings: Settings) -> tuple[Option, ...]:
        """The removals so far, and those of :meth:`complete` that do the least harm, until these save ``stride_ms``."""
        further = self.complete(needed_ms, settings)[len(self.chosen) :]
        further = tuple(sorted(further, key=lambda option: option.harm / option.saved_ms))
        saved_ms = list(itertools.accumulate(option.saved_ms for option in further))
        n = next((i for i, ms in enumerate(saved_ms, 1) if ms >= stride_ms), len(further))
        return (*self.chosen, *further[:n])


def nothing_removed(analysis: Analysis, settings: Settings, stages: Stages) -> PartialPlan:
    """The empty plan, with every removal scored on the unpruned teacher."""
    return PartialPlan((), analysis.options(scores_of(analysis, settings, stages), settings.actions))


def rescored_path(analysis: Analysis, needed_ms: float, settings: Settings, stages: Stages) -> tuple[PartialPlan, ...]:
    """Partial plans from nothing removed towards ``needed_ms``: harms interact, so units are scored anew on the way.

    After every ``plan.step`` of the original latency the least harmful part of the best plan for all of ``needed_ms``
    is replaced by fitted linear maps, the nearest that closed forms come to the trained student, and the units that
    are left are scored on that student. One path serves all targets up to its end; it is empty where nothing has to go.
    """
    if needed_ms <= 0:
        return ()
    path = [nothing_removed(analysis, settings, stages)]
    stride = settings.plan.step * analysis.original_ms
    while (last := path[-1]).saved_ms + stride < needed_ms - stride / 2:  # a short rest is not worth another scoring
        if most_saved(last.options) + last.saved_ms < needed_ms:
            break  # out of reach: choosing will say so
        chosen = last.extend(needed_ms, stride, settings)
        rows = stages.json(f"rescore#{len(path)}", functools.partial(_rescored, analysis, chosen, settings))
        path.append(PartialPlan(chosen, analysis.options([score_of(row) for row in rows], settings.actions)))
    return tuple(path)


def _rescored(analysis: Analysis, chosen: Sequence[Option], settings: Settings) -> list[dict[str, Any]]:
    student = repaired(
        analysis.teacher,
        analysis.removals(chosen),
        analysis.calibration.fit.first(RESCORED_SAMPLES),
        batch_size=analysis.pass_size,
        refit_scope=settings.score.refit_scope,
        rows=RESCORED_ROWS,
    )
    return score_rows(analysis, student, _left(analysis.units, chosen), settings)


def _left(units: Sequence[Unit], chosen: Sequence[Option]) -> list[Unit]:
    """The units that can still go: not those that have gone, nor what they hold, nor what holds one of them."""
    gone = {option.unit_id for option in chosen}
    opened = {holder for option in chosen for holder in option.holders}
    holders = holders_of(units)
    return [unit for unit in units if unit.id not in gone | opened and not gone.intersection(holders[unit.id])]


def best_plan(
    path: Sequence[PartialPlan],
    needed_ms: float,
    *,
    units: Sequence[Unit],
    settings: Settings,
    harm_of: Judge | None = None,
    variants: Sequence[Variant] = VARIANTS,
) -> tuple[tuple[Option, ...], tuple[Variant, ...]]:
    """The plan for ``needed_ms`` that does least harm of those made in several ways, and the variants, best first.

    What was decided up to the last partial plan may leave a gap that only another large unit closes. Replacements take
    milliseconds, too, for which further units may have to go; where these are worth more than what the replacements
    repair, the plan stays without them.

    Args:
        path: see :func:`rescored_path`; it begins with nothing removed.
        needed_ms: milliseconds that have to go.
        units: of the model, in the order of the network.
        settings: of the run.
        harm_of: judges whole plans; without it the harms of the removals are added up.
        variants: those to look at; all of them where these lead to no plan.

    Raises:
        BudgetUnreachableError: ``best_ms`` holds what all removals together would save.
    """
    plans: dict[Variant, tuple[Option, ...]] = {}
    for variant in variants:
        if harm_of is not None or variant.narrow == NARROW[0]:
            plan = _plan_of(path, needed_ms, variant, units=units, settings=settings)
            plans |= {variant: plan} if plan else {}
    if not plans and tuple(variants) != VARIANTS:
        return best_plan(path, needed_ms, units=units, settings=settings, harm_of=harm_of)
    ranked = _ranked(plans, harm_of or total_harm)
    return plans[ranked[0]], ranked


def _ranked(plans: Mapping[Variant, Sequence[Option]], harm_of: Judge) -> tuple[Variant, ...]:
    """The variants by the harm of their plans; each plan is judged once, and none where all are the same."""
    contents = {
        variant: frozenset((option.unit_id, option.action, option.kept) for option in plan)
        for variant, plan in plans.items()
    }
    different = {content: plans[variant] for variant, content in contents.items()}
    if len(different) == 1:
        return tuple(plans)
    harms = {content: harm_of(plan) for content, plan in different.items()}
    return tuple(sorted(plans, key=lambda variant: harms[contents[variant]]))


def _plan_of(
    path: Sequence[PartialPlan], needed_ms: float, variant: Variant, *, units: Sequence[Unit], settings: Settings
) -> tuple[Option, ...]:
    """The least harmful plan of a variant from the last two partial plans that need more; () where there is none."""
    starts = [partial for partial in path if partial.saved_ms < needed_ms] or list(path[:1])
    plans = []
    for start in starts[-2:]:
        weighed = start.with_narrow(variant.narrow)
        if variant.end_replacements:
            plans.append(_with_end_replacements(path, weighed, needed_ms, units=units, settings=settings))
        else:
            chosen = _completed(path, weighed, needed_ms, settings)
            plans.append(canonical(chosen, path, units=units, settings=settings, end_replacements=False))
    return min(filter(None, plans), key=total_harm, default=())


def _with_end_replacements(
    path: Sequence[PartialPlan],
    start: PartialPlan,
    needed_ms: float,
    *,
    units: Sequence[Unit],
    settings: Settings,
) -> tuple[Option, ...]:
    """The plan whose runs all end in a replacement; () where that cannot save so much."""
    request_ms = needed_ms
    for _ in range(MAX_TRIES):
        plan = canonical(_completed(path, start, request_ms, settings), path, units=units, settings=settings)
        missing_ms = needed_ms - sum(option.saved_ms for option in plan)
        if missing_ms <= 1e-9:
            return plan
        request_ms += missing_ms
        if request_ms > most_saved(path[0].options):
            break
    return ()


def total_harm(chosen: Sequence[Option]) -> float:
    """The harms of the removals, added up."""
    return sum(max(0.0, option.harm) for option in chosen)


def _completed(
    path: Sequence[PartialPlan], start: PartialPlan, needed_ms: float, settings: Settings
) -> tuple[Option, ...]:
    try:
        return start.complete(needed_ms, settings)
    except BudgetUnreachableError:
        # What was chosen on the way may stand in the way of the most that can be saved.
        return settings.plan.choose(path[0].options, needed_ms, seed=settings.seed)


def canonical(
    chosen: Sequence[Option],
    path: Sequence[PartialPlan],
    *,
    units: Sequence[Unit],
    settings: Settings,
    end_replacements: bool = True,
) -> tuple[Option, ...]:
    """The chosen units with one linear replacement at the end of every run of removed units, and none before it.

    The replacement at the end is fitted to what the whole run did: those before it add milliseconds and repair hardly
    more, while a run without any leaves the student far from the teacher.

    Args:
        chosen: removals.
        path: on which the other actions of these units were scored.
        units: of the model, in the order of the network.
        settings: say which actions are allowed.
        end_replacements: False leaves the ends of runs as they were chosen.
    """
    if not {"drop", "linear"} <= set(settings.actions):
        return tuple(chosen)
    scored = {(o.unit_id, o.action): o for partial in path for o in (*partial.options, *partial.chosen)}
    gone = {option.unit_id for option in chosen if option.action != "narrow"}
    plan = []
    for option in chosen:
        if option.action == "narrow":
            plan.append(option)
            continue
        at_end = _ends_run(units, option.unit_id, gone)
        action: Action = "drop" if not at_end else "linear" if end_replacements else option.action
        better = scored.get((option.unit_id, action), option)
        plan.append(better if better.saved_ms > 0 else option)
    return tuple(plan)


def _ends_run(units: Sequence[Unit], unit_id: str, gone: Set[str]) -> bool:
    """True unless the unit that takes this one's output goes, too."""
    blocks = [unit for unit in units if isinstance(unit, DepthUnit) and not unit.branch]
    return not any(a.id == unit_id and b.id in gone and _adjacent(a, b) for a, b in itertools.pairwise(blocks))


def _adjacent(first: Unit, second: Unit) -> bool:
    """True when one unit hands its output to the other: siblings of one shape, one after the other."""
    return first.shape == second.shape and first.path.rpartition(".")[0] == second.path.rpartition(".")[0]


def plan_judge(analysis: Analysis, settings: Settings) -> Judge | None:
    """The scorer's judgment of whole plans, each asked for once; None where it scores removals alone."""
    score = settings.score
    if not score.scores_plans:
        return None
    harms: dict[tuple[Removal, ...], float] = {}

    def harm_of(chosen: Sequence[Option]) -> float:
        removals = analysis.removals(chosen)
        if removals not in harms:
            samples, size = analysis.calibration.fit, analysis.pass_size
            inputs = ScoringInputs(analysis.teacher, (), samples, settings.actions, size, settings.seed)
            harms[removals] = score.score_plan(inputs, removals)
        return harms[removals]

    return harm_of
