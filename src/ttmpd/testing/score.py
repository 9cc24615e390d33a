"""Checks of scorers."""

import math
from collections.abc import Sequence

from torch import nn

from ttmpd.records import ACTIONS, Score, Unit
from ttmpd.score.base import Scorer
from ttmpd.specimens import require, tiny_model, tiny_samples, tiny_units, untouched
from ttmpd.testing.common import quick, twice


def _scores(scorer: Scorer, model: nn.Module, units: Sequence[Unit], n: int = 12, seed: int = 0) -> tuple[Score, ...]:
    return quick(scorer).score(model, units, tiny_samples(n), actions=ACTIONS, batch_size=8, seed=seed)


def check_score_untouched(scorer: Scorer) -> None:
    """Scoring changes nothing."""
    model, few, samples = tiny_model(), quick(scorer), tiny_samples()
    units = tiny_units(model)
    with untouched(model, samples):
        few.score(model, units, samples, batch_size=8)


def check_score_repeats(scorer: Scorer) -> None:
    """The same seed gives the same scores, whatever was drawn before."""
    model = tiny_model()
    units = tiny_units(model)
    first, second = twice(lambda: _scores(scorer, model, units))
    require(first == second, "the same seed must give the same scores")


def check_score_complete(scorer: Scorer) -> None:
    """One finite score per unit and action that is declared."""
    model = tiny_model()
    units = tiny_units(model)
    scores = _scores(scorer, model, units)
    wanted = [(unit.id, action) for unit in units for action in type(scorer).actions]
    found = [(score.unit, score.action) for score in scores]
    require(sorted(found) == sorted(wanted), f"scores must be one per unit and action, but got {found}")
    require(all(math.isfinite(score.harm) for score in scores), "scores must be finite")


def check_score_edges(scorer: Scorer) -> None:
    """No units give no scores; one sample is enough for finite ones of an ordinary size."""
    model = tiny_model()
    require(_scores(scorer, model, ()) == (), "no units must give no scores")
    scores = _scores(scorer, model, tiny_units(model), n=1)
    require(bool(scores) and all(abs(s.harm) < 1e6 for s in scores), "one sample must give scores of an ordinary size")


def check_score_of_nothing(scorer: Scorer) -> None:
    """A unit whose branch is all zeros adds nothing: it hurts least, under every action."""
    for number in range(3):
        model = tiny_model()
        for parameter in model.blocks[number].parameters():
            parameter.data.zero_()
        units = tiny_units(model)
        for action in type(scorer).actions:
            harms = [score.harm for score in _scores(scorer, model, units) if score.action == action]
            require(
                all(harms[number] < harm for i, harm in enumerate(harms) if i != number),
                f"a unit that adds nothing must hurt least ({action}), but unit {number} of {harms} does not",
            )


CHECKS = (
    check_score_untouched,
    check_score_repeats,
    check_score_complete,
    check_score_edges,
    check_score_of_nothing,
)
