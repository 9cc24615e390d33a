"""The contract of a planner."""

import abc
import itertools
from collections.abc import Iterable, Sequence

from ttmpd.errors import BudgetUnreachableError, InvalidValueError
from ttmpd.method import Method, check_fields
from ttmpd.records import Option


class Planner(Method, abc.ABC):
    """Chooses removals that save enough milliseconds at little harm. Scores are made once and serve many targets."""

    step: float = 1.0
    """Share of the latency that is removed between two scorings; 1 scores once and takes harms as independent."""

    def __post_init__(self) -> None:
        check_fields(self, step=(0.01, 1.0))

    @abc.abstractmethod
    def choose(self, options: Sequence[Option], needed_ms: float, *, seed: int = 0) -> tuple[Option, ...]:
        """At most one option per unit, and none of a unit that lies in a chosen one, saving ``needed_ms`` or more.

        Args:
            options: every removal that is on offer; one unit may offer several actions.
            needed_ms: milliseconds that have to go; nothing is chosen when it is zero or less.
            seed: of everything random.

        Raises:
            BudgetUnreachableError: all options together do not save enough; ``best_ms`` holds what they would *save*.
        """


def require_reachable(options: Sequence[Option], needed_ms: float) -> None:
    """Raise :class:`BudgetUnreachableError` when no choice saves ``needed_ms``."""
    most = most_saved(options)
    if needed_ms > most + 1e-9:
        raise BudgetUnreachableError(
            f"the plan must save {needed_ms:.3g} ms, but all removable units together save {most:.3g} ms; "
            "ask for less, or allow more units or actions",
            best_ms=most,
        )


def most_saved(options: Sequence[Option]) -> float:
    """What can be saved in all, in milliseconds: in every unit its best action, or the best of what lies in it.

    Example:
        >>> heads, neurons = (Option(name, "narrow", 1.0, 2.0, (0,), ("block",)) for name in ("heads", "neurons"))
        >>> most_saved([Option("block", "drop", 1.0, 3.0), heads, neurons])
        4.0
    """
    return total_saved(option for best in best_by_outermost(options).values() for option in best)


def total_saved(options: Iterable[Option]) -> float:
    """What the options save together, in milliseconds."""
    return sum(option.saved_ms for option in options)


def best_by_outermost(options: Sequence[Option]) -> dict[str, tuple[Option, ...]]:
    """Id of every unit that lies in no other -> the options for it, or in it, that together save most."""
    tree = unit_tree(options)
    by_unit = options_by_unit(useful(options))

    def best(unit: str) -> tuple[Option, ...]:
        inside = tuple(option for inner in tree.get(unit, ()) for option in best(inner))
        whole = max(by_unit.get(unit, ()), key=lambda option: option.saved_ms, default=None)
        return inside if whole is None or total_saved(inside) >= whole.saved_ms else (whole,)

    return {unit: best(unit) for unit in tree.get(OUTERMOST, ())}


OUTERMOST = ""
"""Stands in a :func:`unit_tree` for the holder of units that no unit holds."""


def unit_tree(options: Sequence[Option]) -> dict[str, list[str]]:
    """Unit id -> ids of the units that lie directly in it; under ``OUTERMOST`` those that lie in none.

    Raises:
        InvalidValueError: the holders of two options do not fit into one tree.

    Example:
        >>> unit_tree([Option("heads", "narrow", 1.0, 1.0, (0,), ("block", "attention"))])
        {'': ['block'], 'block': ['attention'], 'attention': ['heads']}
    """
    parents: dict[str, str] = {}
    for option in options:
        for outer, inner in itertools.pairwise((OUTERMOST, *option.holders, option.unit_id)):
            if parents.setdefault(inner, outer) != outer:
                raise InvalidValueError(
                    f"holders of {option.unit_id} must be those of other options, too, but {inner!r} lies in {outer!r} "
                    f"here and in {parents[inner]!r} there"
                )
    tree: dict[str, list[str]] = {}
    for inner, outer in parents.items():
        tree.setdefault(outer, []).append(inner)
    return tree


def options_by_unit(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Unit id -> its options."""
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.unit_id, []).append(option)
    return groups


def useful(options: Sequence[Option]) -> list[Option]:
    """The options that save anything."""
    return [option for option in options if option.saved_ms > 0]
