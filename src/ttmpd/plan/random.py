"""Random removals until the budget is met: the control that every planner has to beat."""

from collections.abc import Sequence
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
    """Options in the given order, one per unit, until they save enough; then the best action of each if they do not."""
    chosen: dict[str, Option] = {}
    for option in order:
        if sum(o.saved_ms for o in chosen.values()) >= needed_ms:
            break
        chosen.setdefault(option.unit, option)
    for option in sorted(order, key=lambda o: o.saved_ms, reverse=True):
        if sum(o.saved_ms for o in chosen.values()) >= needed_ms:
            break
        if option.saved_ms > chosen[option.unit].saved_ms:
            chosen[option.unit] = option
    return tuple(chosen.values())
