"""The contract of a planner."""

import abc
from collections.abc import Sequence

from ttmpd.errors import BudgetUnreachableError
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
        """At most one option per unit, and none of a part of a chosen whole, together saving ``needed_ms`` or more.

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
    """What can be saved in all, in milliseconds: of every unit the best action, and it or its parts."""
    best: dict[str, float] = {}
    wholes = {option.unit_id: option.whole for option in options}
    for option in options:
        best[option.unit_id] = max(best.get(option.unit_id, 0.0), option.saved_ms)
    parts: dict[str, float] = {}
    for unit, whole in wholes.items():
        parts[whole or unit] = parts.get(whole or unit, 0.0) + (best[unit] if whole else 0.0)
    return sum(max(best.get(whole, 0.0), saved) for whole, saved in parts.items())


def useful(options: Sequence[Option]) -> list[Option]:
    """The options that save anything."""
    return [option for option in options if option.saved_ms > 0]
