"""All kinds of units together: find them, and cut a model by a list of removals."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ttmpd.errors import InvalidValueError
from ttmpd.method import method_class, names
from ttmpd.modules import call, count_parameters, evaluating, hooks, module_at, read
from ttmpd.records import Removal, Tap, Unit
from ttmpd.units._members import matrix_of
from ttmpd.units.base import Found, Kind, Narrow
from ttmpd.units.block import Block

WHOLE = Block()
"""The kind of unit that goes as a whole and may have a stand-in."""


def kind_of(name: str) -> Kind:
    """The kind of unit in the file of that name."""
    return cast(Kind, method_class("units", name)())


def narrow_kind(unit: Unit) -> Narrow:
    """The kind of a unit with members."""
    return cast(Narrow, kind_of(unit.kind))


def find_units(model: nn.Module, batch: Tensor, kinds: Sequence[str] | None = None) -> Found:
    """The units of several kinds, in the order in which the network runs them.

    Args:
        model: left untouched.
        batch: a few samples on the model's device.
        kinds: names of files in ``ttmpd/units``; all of them when not given.
    """
    found = [kind_of(name).find(model, batch) for name in (names("units") if kinds is None else kinds)]
    units = [unit for some in found for unit in some.units]
    mixed = _mixed(model, units, batch)
    units = [unit for unit in units if unit.path not in mixed]
    order = _calling_order(model, batch, {unit.path for unit in units})
    units.sort(key=lambda unit: order[unit.path])
    return Found(tuple(units), tuple(row for some in found for row in some.refused) + tuple(mixed.items()))


def _mixed(model: nn.Module, units: Sequence[Unit], batch: Tensor) -> dict[str, str]:
    """Path -> reason of the units whose rows are not those of one sample after the other."""
    if len(batch) < 2:
        return {}
    taps = {unit.path: Tap(unit.path, "output") for unit in units}
    with evaluating(model):
        one, all_of_them = read(model, batch[:1], taps), read(model, batch, taps)
    return {
        path: f"samples must come first in what it answers, but it has the shape {tuple(answer.shape)}"
        for path, answer in all_of_them.items()
        if len(answer) != len(batch) * len(one[path])
    }


def _calling_order(model: nn.Module, batch: Tensor, paths: set[str]) -> dict[str, int]:
    calls: list[str] = []
    handles = [module_at(model, path).register_forward_pre_hook(lambda *_, p=path: calls.append(p)) for path in paths]
    with evaluating(model), hooks(handles):
        call(model, batch[:1])
    return {path: calls.index(path) for path in paths}


def whole_of(unit: Unit, units: Sequence[Unit]) -> str:
    """Id of the larger unit that ``unit`` is a part of, "" when there is none."""
    return next((u.id for u in units if not u.members and u is not unit and unit.path.startswith(f"{u.path}.")), "")


def cut(model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    """A new model: an identity where a whole unit was, kept members alone where one is narrowed; no stand-ins yet."""
    student = WHOLE.cut(model, [removal.unit for removal in removals if not removal.unit.members])
    for removal in removals:
        if removal.unit.members:
            narrow_kind(removal.unit).narrow(student, removal.unit, removal.kept)
    return student


def joined(earlier: Sequence[Removal], later: Sequence[Removal]) -> tuple[Removal, ...]:
    """The removals of a model that was compressed, and those of a second run: what went with a larger unit is left out.

    Example:
        A block whose channels were narrowed first and which is dropped now is one removal: the block.
    """
    wholes = [removal.unit.path for removal in later if not removal.unit.members]
    return (*(r for r in earlier if not any(r.unit.path.startswith(f"{path}.") for path in wholes)), *later)


def check_units(model: nn.Module, units: Sequence[Unit]) -> None:
    """Raise :class:`InvalidValueError` when a unit does not belong to the stock ``model``.

    A unit may be smaller than the model's: it was found where something had been removed from it before.
    """
    for unit in units:
        module = module_at(model, unit.path)
        found = count_parameters(module)
        if unit.members:
            n_inputs = matrix_of(module).shape[1]
            if n_inputs < unit.members:
                raise InvalidValueError(
                    f"unit {unit.id} must have {unit.members} members, but the model's layer reads {n_inputs} inputs; "
                    "the plan belongs to another model"
                )
        elif found < unit.n_params:
            raise InvalidValueError(
                f"unit {unit.id} must have at least {unit.n_params} parameters, but the model's has {found}; "
                "the plan belongs to another model"
            )
