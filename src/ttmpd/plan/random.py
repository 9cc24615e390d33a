"""Random removals until the budget is met: the control that every planner has to beat."""

from collections.abc import Mapping, Sequence
from random import Random as Generator
from typing import ClassVar

from ttmpd.plan.base import Planner, require_reachable, useful
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


def take_until(order: Sequence[Option], needed_ms: float) -> tuple[Option, ...]:
    """Options in the given order until they save enough; then the best action of each if they do not.

    A later option of a unit takes the place of an earlier one if it saves more; a part of a chosen whole is passed by,
    and so is a whole of which a part was chosen, unless only it can save enough.
    """
    chosen: dict[str, Option] = {}
    for option in order:
        if _saved(chosen) >= needed_ms:
            return tuple(chosen.values())
        others = option.whole in chosen or any(other.whole == option.unit_id for other in chosen.values())
        narrower = option.action == "narrow" and option.unit_id in chosen and _more(option, chosen[option.unit_id])
        if not others and (narrower or option.unit_id not in chosen):
            chosen[option.unit_id] = option
    for option in sorted(order, key=lambda o: o.saved_ms, reverse=True):
        if _saved(chosen) >= needed_ms:
            break
        parts = {unit: part for unit, part in chosen.items() if part.whole == option.unit_id}
        if option.whole in chosen or _saved(parts) >= option.saved_ms:
            continue
        if option.unit_id not in chosen or _more(option, chosen[option.unit_id]):
            chosen = {unit: other for unit, other in chosen.items() if unit not in parts} | {option.unit_id: option}
    return tuple(chosen.values())


def _saved(chosen: Mapping[str, Option]) -> float:
    return sum(option.saved_ms for option in chosen.values())


def _more(option: Option, other: Option) -> bool:
    return option.saved_ms > other.saved_ms
