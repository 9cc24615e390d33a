"""How fast a model can become at all: known before anything is scored.

Units are timed one by one, and on a busy machine what they save may add up to more than the whole model takes. So where
a target comes near what they promise, or the promise near the whole, the model without any of them is measured: what is
out of reach is refused at once, and no plan is promised more than that.
"""

import dataclasses
from collections.abc import Sequence

from ttmpd.errors import BudgetUnreachableError
from ttmpd.pipeline.analysis import Analysis
from ttmpd.pipeline.planning import TOLERANCE, measure_plan, needed_ms, unreachable
from ttmpd.pipeline.settings import Settings, Target
from ttmpd.pipeline.stages import Stages
from ttmpd.plan.base import best_by_outermost, total_saved
from ttmpd.records import Option, Score, Unit, WidthUnit

NEAR = 0.7
"""Share of what all units promise up to which a target is believed to be in reach without a measurement."""
ROUGHLY = 0.05
"""How well the speedup without any unit is to be known: only what is clearly out of reach is refused."""
PLAUSIBLE = 0.9
"""Share of the whole model's latency up to which the sum of what units promise is believed."""


def within_reach(analysis: Analysis, targets: Sequence[Target], settings: Settings, stages: Stages) -> Analysis:
    """The analysis, its units promising together no more than removing all of them saves.

    Args:
        analysis: of the model, before any score.
        targets: that shall be reached.
        settings: of the run: which removals are allowed.
        stages: where the measurement is kept.

    Raises:
        BudgetUnreachableError: with everything removed the model is still too slow for a target; ``best_ms`` is its
            latency then.

    Cost: nothing where the targets are well within reach; otherwise one timing of the model without its units.
    """
    largest = largest_removals(analysis, settings)
    promised = total_saved(largest)
    needed = max(needed_ms(analysis, target) for target in targets)
    if needed <= NEAR * promised and promised <= PLAUSIBLE * analysis.lossless_ms:
        return analysis
    fastest_ms, error_ms = stages.json("timing#fastest", lambda: _fastest(analysis, largest, settings))
    for target in targets:
        if target.macs is None and target.budget_ms(analysis.original_ms) * (1 + TOLERANCE) < fastest_ms - 2 * error_ms:
            raise BudgetUnreachableError(unreachable(analysis, target, fastest_ms), fastest_ms)
    possible = max(0.0, analysis.lossless_ms - fastest_ms)
    if promised <= possible:
        return analysis
    latencies = tuple(latency.times(possible / promised) for latency in analysis.latencies)
    return dataclasses.replace(analysis, latencies=latencies)


def largest_removals(analysis: Analysis, settings: Settings) -> tuple[Option, ...]:
    """What is removed when everything goes that may: of every unit the action that saves most, harm left out."""
    actions = [action for action in settings.actions if action in settings.score.actions or action == "narrow"]
    scores = [score for unit in analysis.units for score in _removals_of(unit)]
    options = analysis.options(scores, actions)
    return tuple(option for best in best_by_outermost(options).values() for option in best)


def _removals_of(unit: Unit) -> list[Score]:
    """The removals of a unit, of a width unit the narrowest one, as scores without harm."""
    if isinstance(unit, WidthUnit):
        return [Score(unit.id, "narrow", 0.0, kept=tuple(range(min(unit.widths))))]
    return [Score(unit.id, "drop", 0.0), Score(unit.id, "linear", 0.0)]


def _fastest(analysis: Analysis, largest: Sequence[Option], settings: Settings) -> list[float]:
    """(milliseconds, their standard error) of the model without all that may go."""
    attempt = measure_plan(analysis, largest, settings, seconds=(0.5, 2.0), precision=ROUGHLY)
    return [attempt.measured_ms, attempt.error_ms]
