"""Least harm per millisecond first: what PRACTISE does."""

from collections.abc import Sequence
from typing import ClassVar

from ttmpd.plan.base import Planner, require_reachable, useful
from ttmpd.plan.random import take_until
from ttmpd.records import Option


class Greedy(Planner):
    """Options by harm over saving, ascending, until enough is saved. Scores are taken as independent."""

    source: ClassVar[str] = "PRACTISE (arXiv 2202.07861), s = R / tau, the lowest dropped first"

    def choose(self, options: Sequence[Option], needed_ms: float, *, seed: int = 0) -> tuple[Option, ...]:
        """The cheapest options per millisecond that meet the budget."""
        require_reachable(options, needed_ms)
        return take_until(sorted(useful(options), key=lambda o: (o.harm / o.saved_ms, o.unit_id)), needed_ms)
