"""Members switched off in place; the masked output equals the cut output."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ttmpd.errors import first_line
from ttmpd.models.modules import hooks, module_at
from ttmpd.models.run import call, evaluating
from ttmpd.records import Unit
from ttmpd.surgery.layers import columns, inputs_of

Narrow = Callable[[nn.Module, Unit, Sequence[int]], None]
"""Takes all members of a unit but those given out of a model, in place."""


@contextlib.contextmanager
def masked(model: nn.Module, kept: Mapping[Unit, Sequence[int]]) -> Iterator[None]:
    """While active, the layers at the units' paths see zeros where members are that are not kept."""
    handles = []
    for unit, members in kept.items():
        layer = module_at(model, unit.path)
        mask = torch.zeros(inputs_of(layer))
        mask[columns(model, unit, members)] = 1
        mask = mask.view((-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,))
        handles.append(layer.register_forward_pre_hook(lambda _m, args, mask=mask: _hidden(args, mask)))
    with hooks(handles):
        yield


def _hidden(args: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    return (args[0] * mask.to(args[0]), *args[1:])


def _half(unit: Unit) -> tuple[int, ...]:
    return tuple(range(0, unit.members, 2))


def proven(
    narrow: Narrow,
    model: nn.Module,
    units: Sequence[Unit],
    batch: Tensor,
    keep: Callable[[Unit], tuple[int, ...]] = _half,
) -> tuple[list[Unit], dict[str, str]]:
    """(units that can be narrowed, path -> reason of the others): masked and cut models must answer alike.

    ``narrow(student, unit, members)`` takes all other members out of a copy. ``keep`` says which members stay in this
    trial. All units are tried at once on one copy, and one by one only where that fails.
    """
    if not units or not (reason := _differs(narrow, model, {unit: keep(unit) for unit in units}, batch)):
        return list(units), {}
    if len(units) == 1:
        return [], {units[0].path: reason}
    half = len(units) // 2
    kept, refused = proven(narrow, model, units[:half], batch, keep)
    more, others = proven(narrow, model, units[half:], batch, keep)
    return kept + more, refused | others


def _differs(narrow: Narrow, model: nn.Module, kept: Mapping[Unit, Sequence[int]], batch: Tensor) -> str:
    """Why the units cannot be narrowed to the members, "" when they can."""
    try:
        student = copy.deepcopy(model)
        for unit, members in kept.items():
            narrow(student, unit, members)
        with evaluating(student):
            cut = call(student, batch)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        return f"the model does not run with fewer: {first_line(error)[:120]}"
    with evaluating(model), masked(model, kept):
        wanted = call(model, batch)
    scale = max(1.0, float(wanted.abs().max()))
    return "" if torch.allclose(cut, wanted, rtol=0, atol=1e-4 * scale) else "what it computes depends on all of them"
