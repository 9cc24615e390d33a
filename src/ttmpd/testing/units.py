"""Checks of kinds of units."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttmpd.models.modules import clone, count_parameters
from ttmpd.models.run import evaluating
from ttmpd.records import DepthUnit, Removal, Unit, WidthUnit
from ttmpd.surgery.masks import mask_of, masked
from ttmpd.surgery.units.base import DepthUnits, UnitFinder, WidthUnits
from ttmpd.testing.common import answer
from ttmpd.testing.tiny_models import assert_untouched, require


def _example(kind: UnitFinder) -> tuple[nn.Module, Tensor, tuple[Unit, ...]]:
    model, batch = kind.example()
    units = kind.find(model, batch).units
    require(len(units) >= 2, "the example of a kind must hold at least two units")
    return model, batch, units


def _removals(units: Sequence[Unit]) -> list[list[Removal]]:
    """Some ways to remove the units: whole ones are dropped, the others keep each number of members that is offered."""
    n_ways = max(len(unit.widths) if isinstance(unit, WidthUnit) else 1 for unit in units)
    return [[removal for unit in units for removal in _removal(unit, number)] for number in range(n_ways)]


def _removal(unit: Unit, number: int) -> list[Removal]:
    if not isinstance(unit, WidthUnit):
        return [Removal(unit, "drop")]
    widths = unit.widths[number : number + 1]
    return [Removal(unit, "narrow", tuple(range(unit.n_members - width, unit.n_members))) for width in widths]


def _cut(kind: UnitFinder, model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    student = clone(model)
    for removal in removals:
        if isinstance(kind, DepthUnits) and isinstance(removal.unit, DepthUnit):
            kind.drop(student, removal.unit)
        elif isinstance(kind, WidthUnits) and isinstance(removal.unit, WidthUnit):
            kind.narrow(student, removal.unit, removal.kept)
    return student


def _masked_answer(model: nn.Module, batch: Tensor, removals: Sequence[Removal]) -> Tensor:
    with masked(model, {removal.unit: mask_of(removal.unit, removal.kept) for removal in removals}):
        return answer(model, batch)


def check_units_untouched(kind: UnitFinder) -> None:
    """Finding, masking and cutting change nothing; an earlier mask leaves no trace."""
    model, batch, units = _example(kind)
    with assert_untouched(model):
        kind.find(model, batch)
        for removals in _removals(units):
            _cut(kind, model, removals)
            with evaluating(model):  # batch norm that trains moves by itself
                _masked_answer(model, batch, removals)
    require(kind.find(model, batch).units == units, "the same model must have the same units")


def check_masked_equals_cut(kind: UnitFinder) -> None:
    """The masked model answers like the cut one, for each unit and for all together, and unlike the whole one."""
    model, batch, units = _example(kind)
    whole = answer(model, batch)
    for chosen in [(), *((unit,) for unit in units), units]:
        for removals in _removals(chosen) if chosen else [[]]:
            masked_output = _masked_answer(model, batch, removals)
            gap = float((masked_output - answer(_cut(kind, model, removals), batch)).abs().max())
            require(
                gap <= 1e-5, f"masked output must equal cut output, but they differ by {gap} for {len(chosen)} units"
            )
            alike = torch.equal(masked_output, whole)
            require(alike == (not removals), "a removal must change the answer, and nothing else may")
    require(torch.equal(answer(model, batch), whole), "the model must answer as before once the mask is off")


def check_masks_have_gradients(kind: UnitFinder) -> None:
    """A mask of ones changes nothing, and the gradient of the output reaches every value of it."""
    model, batch, units = _example(kind)
    masks = {unit: torch.ones_like(mask_of(unit)).requires_grad_() for unit in units}
    with evaluating(model, gradients=True), masked(model, masks):
        output = model(batch)
    require(torch.allclose(output, answer(model, batch), atol=1e-6), "a mask of ones must change nothing")
    output.square().sum().backward()
    for unit, mask in masks.items():
        require(mask.grad is not None and bool((mask.grad != 0).all()), f"gradients must reach the mask of {unit.id}")


def check_parameters_fall(kind: UnitFinder) -> None:
    """As many weights go as the units say, in proportion to the members that go."""
    model, _, units = _example(kind)
    for chosen in (units[:1], units):
        for removals in _removals(chosen):
            gone = count_parameters(model) - count_parameters(_cut(kind, model, removals))
            stated = sum(r.unit.n_params * (1 - float(mask_of(r.unit, r.kept).double().mean())) for r in removals)
            require(abs(gone - stated) < 1e-3, f"{stated} parameters must go with {len(chosen)} units, but {gone} went")


def check_cuts_commute(kind: UnitFinder) -> None:
    """The order of cuts does not matter, and cutting draws nothing."""
    model, batch, units = _example(kind)
    state = torch.get_rng_state()
    for removals in _removals(units[:2]):
        first, second = removals[:1], removals[1:]
        students = (
            _cut(kind, _cut(kind, model, first), second),
            _cut(kind, _cut(kind, model, second), first),
            _cut(kind, model, (*first, *second)),
        )
        answers = [answer(student, batch) for student in students]
        require(torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2]), "cuts must commute")
    if isinstance(kind, DepthUnits) and isinstance(units[0], DepthUnit) and "linear" in kind.actions:
        kind.replacement(units[0])
    require(torch.equal(state, torch.get_rng_state()), "the random state of torch must stay as it was")


def check_cut_exports(kind: UnitFinder) -> None:
    """``torch.export`` takes the cut model, and the exported program answers alike."""
    model, batch, units = _example(kind)
    student = _cut(kind, model, _removals(units[:1])[0])
    program = torch.export.export(student, (batch,)).module()
    alike = torch.allclose(program(batch), answer(student, batch), atol=1e-5)
    require(alike, "the exported program must answer alike")


CHECKS = (
    check_units_untouched,
    check_masked_equals_cut,
    check_masks_have_gradients,
    check_parameters_fall,
    check_cuts_commute,
    check_cut_exports,
)
