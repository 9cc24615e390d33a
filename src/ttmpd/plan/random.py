"""Random removals until the budget is met: the control that every planner has to beat."""

from collections.abc import Sequence
from random import Random as Generator
from typing import ClassVar

from ttmpd.plan.base import Planner, best_by_outermost, require_reachable, total_saved, useful
from ttmpd.records import Option


class Random(Planner):
    """Options in random order, one per unit, until enough is saved."""

    source: ClassVar[str] = "control"

    def choose(self, options: Sequence[Option], needed_ms: float, *, seed: int = 0) -> tuple[Option, ...]:
        """A random plan that meets the budget."""
        require_reachable(options, needed_ms)
        order = useful(options)
        # The order is drawn once for all budgets, so a larger budget removes a part of what a smaller one removes.
        Generator(seed).shuffle(order)
        return take_until(order, needed_ms)


def take_until(options: Sequence[Option], needed_ms: float) -> tuple[Option, ...]:
    """Options in their order until they save enough.

    An option takes the place of an earlier one of its unit if it narrows it further; one that an earlier option
    excludes is passed by. Where all of them together save too little, the outermost units in which most is to be gained
    are given their best options instead, one after the other.

    Args:
        options: that save anything.
        needed_ms: milliseconds that have to go; no more than all options can save together.
    """
    chosen: dict[str, Option] = {}
    for option in options:
        if total_saved(chosen.values()) >= needed_ms:
            return tuple(chosen.values())
        earlier = chosen.get(option.unit_id)
        if earlier is not None:
            further = option.action == "narrow" and option.saved_ms > earlier.saved_ms
        else:
            further = not any(option.excludes(other) for other in chosen.values())
        if further:
            chosen[option.unit_id] = option
    return _topped_up(tuple(chosen.values()), options, needed_ms)


def _topped_up(chosen: tuple[Option, ...], options: Sequence[Option], needed_ms: float) -> tuple[Option, ...]:
    """The chosen options, in some of the outermost units replaced by the best ones, until they save enough."""
    best = best_by_outermost(options)
    gains = {unit: total_saved(best[unit]) - total_saved(_inside(chosen, unit)) for unit in best}
    for unit in sorted(gains, key=gains.__getitem__, reverse=True):
        if total_saved(chosen) >= needed_ms:
            break
        replaced = _inside(chosen, unit)
        chosen = (*(option for option in chosen if option not in replaced), *best[unit])
    return chosen


def _inside(chosen: Sequence[Option], unit: str) -> list[Option]:
    return [option for option in chosen if unit in (option.unit_id, *option.holders)]
