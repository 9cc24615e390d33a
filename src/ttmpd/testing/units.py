"""Checks of kinds of units."""

import torch
from torch import Tensor

from ttmpd.modules import count_parameters
from ttmpd.records import Unit
from ttmpd.specimens import TinyNet, require, tiny_model, tiny_samples, untouched
from ttmpd.testing.common import answer
from ttmpd.units.base import Kind


def _found(kind: Kind) -> tuple[TinyNet, Tensor, tuple[Unit, ...]]:
    model, batch = tiny_model(), tiny_samples(4).batch(slice(None))
    units = kind.find(model, batch).units
    require(len(units) >= 2, "the model of the checks must hold at least two units")
    return model, batch, units


def check_units_untouched(kind: Kind) -> None:
    """Finding, masking and cutting change nothing; an earlier mask leaves no trace."""
    model, batch, units = _found(kind)
    with untouched(model):
        kind.find(model, batch)
        kind.cut(model, units)
        with kind.mask(model, units):
            pass
    require(kind.find(model, batch).units == units, "the same model must have the same units")


def check_masked_equals_cut(kind: Kind) -> None:
    """The masked model answers like the cut one, for each unit and for all together, and unlike the whole one."""
    model, batch, units = _found(kind)
    whole = answer(model, batch)
    for chosen in [(), *((unit,) for unit in units), units]:
        with kind.mask(model, chosen):
            masked = answer(model, batch)
        gap = float((masked - answer(kind.cut(model, chosen), batch)).abs().max())
        require(gap <= 1e-5, f"masked output must equal cut output, but they differ by {gap} for {len(chosen)} units")
        require(torch.equal(masked, whole) == (not chosen), "a removal must change the answer, and nothing else may")
    require(torch.equal(answer(model, batch), whole), "the model must answer as before once the mask is off")


def check_parameters_fall(kind: Kind) -> None:
    """As many weights go as the units say."""
    model, _, units = _found(kind)
    for chosen in ((), units[:1], units):
        gone = count_parameters(model) - count_parameters(kind.cut(model, chosen))
        stated = sum(unit.n_params for unit in chosen)
        require(gone == stated, f"{stated} parameters must go with {len(chosen)} units, but {gone} went")


def check_cuts_commute(kind: Kind) -> None:
    """The order of cuts does not matter, and building a stand-in draws nothing."""
    model, batch, units = _found(kind)
    first, second = units[:1], units[1:2]
    state = torch.get_rng_state()
    kind.stand_in(units[0])
    require(torch.equal(state, torch.get_rng_state()), "the random state of torch must stay as it was")
    answers = [
        answer(student, batch)
        for student in (
            kind.cut(kind.cut(model, first), second),
            kind.cut(kind.cut(model, second), first),
            kind.cut(model, (*first, *second)),
        )
    ]
    require(torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2]), "cuts must commute")


def check_cut_exports(kind: Kind) -> None:
    """``torch.export`` takes the cut model, and the exported program answers alike."""
    model, batch, units = _found(kind)
    student = kind.cut(model, units[:1])
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
