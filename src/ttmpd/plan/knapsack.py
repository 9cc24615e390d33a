"""The exact choice: least total harm among all plans that meet the budget."""

from collections.abc import Sequence
from typing import ClassVar

from ttmpd.method import check_fields
from ttmpd.plan.base import OUTERMOST, Planner, options_by_unit, require_reachable, unit_tree, useful
from ttmpd.records import Option


class Knapsack(Planner):
    """Multiple-choice knapsack over nested units, solved by its Pareto front, unit by unit.

    A unit goes as a whole, or some of those that lie in it do. After each unit only choices stay that no other beats in
    both harm and milliseconds. The answer is exact as long as the front has at most ``max_front`` points; beyond,
    points that lie closest together are thinned out.
    """

    source: ClassVar[str] = (
        "multiple-choice knapsack (Sinha and Zoltners, 1979) by dominance (Nemhauser and Ullmann, 1969)"
    )
    step: float = 0.125
    max_front: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, max_front=2)

    def choose(self, options: Sequence[Option], needed_ms: float, *, seed: int = 0) -> tuple[Option, ...]:
        """The options of least total harm that save at least ``needed_ms``."""
        require_reachable(options, needed_ms)
        if needed_ms <= 0:
            return ()
        offered = useful(options)
        tree, by_unit = unit_tree(offered), options_by_unit(offered)

        def extended(front: list[_Point], unit: str) -> list[_Point]:
            """The front when it is also decided what becomes of the unit and of all that lies in it."""
            inside = front
            for inner in tree.get(unit, ()):
                inside = extended(inside, inner)
            points = inside + _with_each(front, by_unit.get(unit, ()))
            return _thinned(_pareto(points, needed_ms), self.max_front)

        front = extended([(0.0, 0.0, None)], OUTERMOST)
        _, _, link = min((p for p in front if p[0] >= needed_ms - 1e-9), key=lambda p: (p[1], p[0]))
        return _options(link)


_Link = tuple[Option, "_Link"] | None
_Point = tuple[float, float, _Link]
"""(saved, harm, link); the link is (option, link before) so that choices are never copied."""


def _with_each(front: list[_Point], choices: Sequence[Option]) -> list[_Point]:
    """Every point with every choice added."""
    return [(s + o.saved_ms, h + max(o.harm, 0.0), (o, link)) for s, h, link in front for o in choices]


def _pareto(points: list[_Point], needed_ms: float) -> list[_Point]:
    """Points that no other beats, by falling savings; what is saved beyond the need counts nothing."""
    front: list[_Point] = []
    least = float("inf")
    for point in sorted(points, key=lambda p: (-min(p[0], needed_ms), p[1], -p[0])):
        if point[1] < least:
            front.append(point)
            least = point[1]
    return front


def _thinned(front: list[_Point], limit: int) -> list[_Point]:
    """At most ``limit`` points, spread evenly over the front; both ends stay."""
    if len(front) <= limit:
        return front
    return [front[round(i * (len(front) - 1) / (limit - 1))] for i in range(limit)]


def _options(link: _Link) -> tuple[Option, ...]:
    chosen: list[Option] = []
    while link is not None:
        option, link = link
        chosen.append(option)
    return tuple(reversed(chosen))
