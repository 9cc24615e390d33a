"""Checks of kinds of units."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttmpd.models.modules import clone, count_parameters
from ttmpd.models.run import evaluating
from ttmpd.records import Removal, Unit
from ttmpd.surgery.masks import masked
from ttmpd.surgery.units.base import Kind, Narrow, Whole
from ttmpd.testing.common import answer
from ttmpd.testing.tiny_models import require, specimen, untouched


def _found(kind: Kind) -> tuple[nn.Module, Tensor, tuple[Unit, ...]]:
    model, samples = specimen(kind.name, 4)
    batch = samples.batch(slice(None))
    units = kind.find(model, batch).units
    require(len(units) >= 2, "the model of the checks must hold at least two units")
    return model, batch, units


def _removals(kind: Kind, units: Sequence[Unit]) -> list[list[Removal]]:
    """Some ways to remove the units: whole ones are dropped, the others keep each number of members that is offered."""
    if not isinstance(kind, Narrow):
        return [[Removal(unit, "drop") for unit in units]]
    widths = max(len(unit.widths) for unit in units)
    return [
        [
            Removal(unit, "narrow", tuple(range(unit.members))[-width:] if width else ())
            for unit in units
            for width in unit.widths[number : number + 1]
        ]
        for number in range(widths)
    ]


def _cut(kind: Kind, model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    if isinstance(kind, Whole):
        return kind.cut(model, [removal.unit for removal in removals])
    assert isinstance(kind, Narrow)
    student = clone(model)
    for removal in removals:
        kind.narrow(student, removal.unit, removal.kept)
    return student


def _masked_answer(kind: Kind, model: nn.Module, batch: Tensor, removals: Sequence[Removal]) -> Tensor:
    if isinstance(kind, Whole):
        with kind.mask(model, [removal.unit for removal in removals]):
            return answer(model, batch)
    with masked(model, {removal.unit: removal.kept for removal in removals}):
        return answer(model, batch)


def check_units_untouched(kind: Kind) -> None:
    """Finding, masking and cutting change nothing; an earlier mask leaves no trace."""
    model, batch, units = _found(kind)
    with untouched(model):
        kind.find(model, batch)
        for removals in _removals(kind, units):
            _cut(kind, model, removals)
            with evaluating(model):  # batch norm that trains moves by itself
                _masked_answer(kind, model, batch, removals)
    require(kind.find(model, batch).units == units, "the same model must have the same units")


def check_masked_equals_cut(kind: Kind) -> None:
    """The masked model answers like the cut one, for each unit and for all together, and unlike the whole one."""
    model, batch, units = _found(kind)
    whole = answer(model, batch)
    for chosen in [(), *((unit,) for unit in units), units]:
        for removals in _removals(kind, chosen) if chosen else [[]]:
            found = _masked_answer(kind, model, batch, removals)
            gap = float((found - answer(_cut(kind, model, removals), batch)).abs().max())
            require(
                gap <= 1e-5, f"masked output must equal cut output, but they differ by {gap} for {len(chosen)} units"
            )
            alike = torch.equal(found, whole)
            require(alike == (not removals), "a removal must change the answer, and nothing else may")
    require(torch.equal(answer(model, batch), whole), "the model must answer as before once the mask is off")


def check_parameters_fall(kind: Kind) -> None:
    """As many weights go as the units say, in proportion to the members that go."""
    model, _, units = _found(kind)
    for chosen in (units[:1], units):
        for removals in _removals(kind, chosen):
            gone = count_parameters(model) - count_parameters(_cut(kind, model, removals))
            stated = sum(r.unit.n_params * (1 - len(r.kept) / max(1, r.unit.members)) for r in removals)
            require(abs(gone - stated) < 1e-6, f"{stated} parameters must go with {len(chosen)} units, but {gone} went")


def check_cuts_commute(kind: Kind) -> None:
    """The order of cuts does not matter, and cutting draws nothing."""
    model, batch, units = _found(kind)
    state = torch.get_rng_state()
    for removals in _removals(kind, units[:2]):
        first, second = removals[:1], removals[1:]
        students = (
            _cut(kind, _cut(kind, model, first), second),
            _cut(kind, _cut(kind, model, second), first),
            _cut(kind, model, (*first, *second)),
        )
        answers = [answer(student, batch) for student in students]
        require(torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2]), "cuts must commute")
    if isinstance(kind, Whole):
        kind.stand_in(units[0])
    require(torch.equal(state, torch.get_rng_state()), "the random state of torch must stay as it was")


def check_cut_exports(kind: Kind) -> None:
    """``torch.export`` takes the cut model, and the exported program answers alike."""
    model, batch, units = _found(kind)
    student = _cut(kind, model, _removals(kind, units[:1])[0])
    program = torch.export.export(student, (batch,)).module()
    alike = torch.allclose(program(batch), answer(student, batch), atol=1e-5)
    require(alike, "the exported program must answer alike")


CHECKS = (
    check_units_untouched,
    check_masked_equals_cut,
    check_parameters_fall,
    check_cuts_commute,
    check_cut_exports,
)
