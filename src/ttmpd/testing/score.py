"""Checks of scorers."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.records import ACTIONS, Score, Unit, WidthUnit
from ttmpd.score.base import Scorer
from ttmpd.surgery.find import depth_kind, find_units, kinds_of
from ttmpd.testing.common import quick, twice
from ttmpd.testing.tiny_models import (
    TinyNet,
    assert_untouched,
    example_of_kind,
    require,
    tiny_model,
    tiny_samples,
    tiny_units,
)

Case = tuple[nn.Module, tuple[Unit, ...], Samples]


def _cases(scorer: Scorer, n: int = 12) -> Iterator[Case]:
    """The examples of the kinds that the scorer says it can judge, with all units in them that it can."""
    kinds, examples = kinds_of(*scorer.scopes), set[type[nn.Module]]()
    for kind in kinds:
        model, samples = example_of_kind(kind, n)
        units = find_units(model, samples.batch(slice(0, 2)), kinds).units
        judged = tuple(unit for unit in units if scorer.can_judge(model, unit))
        if any(unit.kind == kind for unit in judged) and type(model) not in examples:
            examples.add(type(model))
            yield model, judged, samples


def _scores(scorer: Scorer, case: Case, seed: int = 0) -> tuple[Score, ...]:
    model, units, samples = case
    return quick(scorer).score(model, units, samples, actions=ACTIONS, batch_size=8, seed=seed)


def check_score_untouched(scorer: Scorer) -> None:
    """Scoring changes nothing."""
    for case in _cases(scorer):
        with assert_untouched(case[0], case[2]):
            _scores(scorer, case)


def check_score_repeats(scorer: Scorer) -> None:
    """The same seed gives the same scores, whatever was drawn before."""
    for case in _cases(scorer):
        first, second = twice(lambda case=case: _scores(scorer, case))  # type: ignore[misc]
        require(first == second, "the same seed must give the same scores")


def check_score_complete(scorer: Scorer) -> None:
    """One finite score per unit and action that is declared, or per width; the kept members belong to the unit."""
    for _, units, samples in (cases := list(_cases(scorer))):
        del samples
        expected = [
            (unit.id, action, 0)
            for unit in units
            if not isinstance(unit, WidthUnit)
            for action in type(scorer).actions
            if action in depth_kind(unit).actions
        ]
        expected += [(unit.id, "narrow", n) for unit in units if isinstance(unit, WidthUnit) for n in unit.widths]
        scores = _scores(scorer, next(case for case in cases if case[1] is units))
        rows = [(score.unit_id, score.action, len(score.kept)) for score in scores]
        require(sorted(rows) == sorted(expected), f"scores must be one per unit and action or width, but got {rows}")
        require(all(math.isfinite(score.harm) for score in scores), "scores must be finite")
        members = {unit.id: unit.n_members if isinstance(unit, WidthUnit) else 0 for unit in units}
        for score in scores:
            inside = all(0 <= member < members[score.unit_id] for member in score.kept)
            require(inside and list(score.kept) == sorted(set(score.kept)), "kept members must be some of the unit's")


def check_score_edges(scorer: Scorer) -> None:
    """No units give no scores; one sample is enough for finite ones of an ordinary size."""
    for case in _cases(scorer, n=1):
        require(_scores(scorer, (case[0], (), case[2])) == (), "no units must give no scores")
        scores = _scores(scorer, case)
        ordinary = bool(scores) and all(abs(score.harm) < 1e6 for score in scores)
        require(ordinary, "one sample must give scores of an ordinary size")


def check_score_of_nothing(scorer: Scorer) -> None:
    """Units whose weights are zero have the lowest harm, under every action; of members those that add nothing."""
    if "depth" in scorer.scopes:
        for number in range(3):
            _check_block_of_nothing(scorer, number)
    for kind in kinds_of("width") if "width" in scorer.scopes else ():
        _check_members_of_nothing(scorer, kind)


def _check_block_of_nothing(scorer: Scorer, number: int) -> None:
    model: TinyNet = tiny_model()
    for parameter in model.blocks[number].parameters():
        parameter.data.zero_()
    scores = _scores(scorer, (model, tiny_units(model), tiny_samples()))
    for action in type(scorer).actions:
        harms = [score.harm for score in scores if score.action == action]
        require(
            all(harms[number] < harm for i, harm in enumerate(harms) if i != number),
            f"a unit that adds nothing must hurt least ({action}), but unit {number} of {harms} does not",
        )


def _check_members_of_nothing(scorer: Scorer, kind: str) -> None:
    """The first half of the members of a unit adds nothing, so none of them stays while another member goes."""
    model, samples = example_of_kind(kind)
    unit = find_units(model, samples.batch(slice(0, 2)), [kind]).units[0]
    if not isinstance(unit, WidthUnit) or not scorer.can_judge(model, unit):
        return
    layer = model.get_submodule(unit.path)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    with torch.no_grad():
        layer.weight[:, : layer.weight.shape[1] // 2] = 0
    silent = set(range(unit.n_members // 2))
    for score in _scores(scorer, (model, (unit,), samples)):
        silent_kept, removed = silent & set(score.kept), set(range(unit.n_members)) - silent - set(score.kept)
        require(not (silent_kept and removed), f"members that add nothing must go first, but got {sorted(removed)}")


CHECKS = (
    check_score_untouched,
    check_score_repeats,
    check_score_complete,
    check_score_edges,
    check_score_of_nothing,
)
