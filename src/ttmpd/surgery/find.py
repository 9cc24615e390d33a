"""All removable units of a model, and which kind a unit is of."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ttmpd.method import method_class, names
from ttmpd.models.modules import hooks, module_at
from ttmpd.models.run import call, evaluating
from ttmpd.models.taps import read
from ttmpd.records import Tap, Unit
from ttmpd.surgery.units.base import Found, Kind, Narrow


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
        kinds: names of files in ``ttmpd/surgery/units``; all of them when not given.
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
