"""The contract of every method as checks that run in about a second each, on a model of a few thousand weights.

    for check in checks_for("score"):
        check(MyScorer())

A check raises :class:`AssertionError` that says what was broken. The checks of a verb lie in the file of its name,
those of every verb in ``methods``. :func:`all_methods` lists the methods by their files, and
:func:`expected_failures` the checks that a method does not pass, with the reason.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from ttmpd.method import VERBS, names
from ttmpd.testing import methods

Check = Callable[[Any], None]

EXPECTED_FAILURES: dict[tuple[str, str], dict[str, str]] = {
    ("score", "random"): {"check_score_of_nothing": "random harms know nothing of the unit: the control"},
    ("score", "kcm"): {"check_score_of_nothing": "ranks how well neurons represent others, not how much they add"},
    ("distill", "mimic"): {"check_never_worse": "the baseline has no guard: it is kept as its authors run it"},
}
"""(verb, name) -> name of a check -> the reason why the method does not pass it."""


def all_methods() -> tuple[tuple[str, str], ...]:
    """(verb, name) of every method that has a file."""
    return tuple((verb, name) for verb in VERBS for name in names(verb))


def checks_for(verb: str) -> tuple[Check, ...]:
    """The checks that every method of a verb passes."""
    return (*methods.CHECKS, *import_module(f"ttmpd.testing.{verb}").CHECKS)


def expected_failures(verb: str, name: str) -> dict[str, str]:
    """Name of a check -> the reason why this method does not pass it."""
    return dict(EXPECTED_FAILURES.get((verb, name), {}))
