"""Units masked in place, by values that may have gradients; the masked output equals the cut output."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ttmpd.errors import first_line
from ttmpd.models.modules import hooks, module_at, patched_forward
from ttmpd.models.run import evaluating, first_tensor, same_outputs
from ttmpd.models.trace import first_argument
from ttmpd.records import DepthUnit, Unit, WidthUnit
from ttmpd.surgery.layers import inputs_of, n_axes
from ttmpd.surgery.reasons import Reason, Refusal
from ttmpd.surgery.replacements import dropped, forward_of, in_form

U = TypeVar("U", bound=Unit)
Remove = Callable[[nn.Module, U, Sequence[int]], None]
"""Takes a unit out of a model, in place; of one with members all but those given."""


@contextlib.contextmanager
def masked(model: nn.Module, masks: Mapping[U, Tensor]) -> Iterator[None]:
    """While active, every unit counts as much as its mask says: 1 as it is, 0 as if it were removed.

    Args:
        model: left untouched; hooks are on it while the mask is.
        masks: unit -> its mask. Of a depth unit one value: its output times the mask, and where the unit holds the
            shortcut itself its input times the rest. Of a width unit (n_members,) values: what its consumers read is
            multiplied. Any values; gradients flow to them.

    Example:
        >>> from ttmpd.surgery.units.neuron import Neuron
        >>> model, batch = Neuron().example()
        >>> unit = Neuron().find(model, batch).units[0]
        >>> mask = torch.ones(unit.n_members, requires_grad=True)
        >>> with masked(model, {unit: mask}):
        ...     model(batch).sum().backward()
        >>> mask.grad.shape == mask.shape
        True
    """
    handles = []
    for unit, mask in masks.items():
        if isinstance(unit, WidthUnit):
            for path in unit.consumers:
                layer = module_at(model, path)
                handles.append(layer.register_forward_pre_hook(_scaling(layer, mask)))
        else:
            module = module_at(model, unit.path)
            hook = _blending(unit, mask)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with hooks(handles):
        yield


def mask_of(unit: Unit, kept_members: Sequence[int] = ()) -> Tensor:
    """The mask of a removal: 1 for the members that are kept, 0 for all others, and for a unit without members.

    Example:
        >>> mask_of(DepthUnit("block", "body.0", "Block", (4,), "channels_last", 20, 20))
        tensor(0.)
    """
    if not isinstance(unit, WidthUnit):
        return torch.zeros(())
    mask = torch.zeros(unit.n_members)
    mask[list(kept_members)] = 1
    return mask


def _scaling(layer: nn.Module, mask: Tensor) -> Callable[..., tuple[Any, ...]]:
    def scale(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        spread = mask.to(args[0]).repeat_interleave(inputs_of(layer) // len(mask))
        return (args[0] * spread.view(-1, *[1] * n_axes(layer)), *args[1:])

    return scale


def _blending(unit: Unit, mask: Tensor) -> Callable[..., Any]:
    def blend(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value = first_tensor(output)
        assert value is not None
        share = mask.to(value)
        mixed = share * value
        if isinstance(unit, DepthUnit) and not unit.branch:
            mixed = mixed + (1 - share) * first_argument(args, kwargs)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return blend


def skipped(model: nn.Module, units: Sequence[Unit]) -> contextlib.AbstractContextManager[None]:
    """While active, the depth units are not run: the model answers as the cut model would, at its speed."""
    stubs = {unit.path: forward_of(unit, functools.partial(dropped, unit)) for unit in units}
    for unit in units:
        for path, form in unit.upstream if isinstance(unit, DepthUnit) else ():
            stubs[path] = in_form(form, lambda x: x)
    return patched_forward(model, stubs)


def every_second(unit: Unit) -> tuple[int, ...]:
    """Every second member of a unit, and none of one without members: the removal by which a unit is tried."""
    return tuple(range(0, unit.n_members, 2)) if isinstance(unit, WidthUnit) else ()


def proven(
    remove: Remove[U],
    model: nn.Module,
    units: Sequence[U],
    batch: Tensor,
) -> tuple[list[U], dict[str, Refusal]]:
    """(units that can be removed, path -> why the others cannot): masked and cut models must answer alike.

    In this trial every second member stays. All units are tried at once on one copy, and in halves where that fails.
    """
    if not units or not (refusal := _difference(remove, model, {unit: every_second(unit) for unit in units}, batch)):
        return list(units), {}
    if len(units) == 1:
        return [], {units[0].path: refusal}
    half = len(units) // 2
    first, refused = proven(remove, model, units[:half], batch)
    second, more_refusals = proven(remove, model, units[half:], batch)
    return first + second, refused | more_refusals


def _difference(
    remove: Remove[U], model: nn.Module, kept_members: Mapping[U, Sequence[int]], batch: Tensor
) -> Refusal | None:
    """Why the units cannot be removed but for the members, None when they can."""
    try:
        student = copy.deepcopy(model)
        for unit, members in kept_members.items():
            remove(student, unit, members)
        with evaluating(student):
            cut = student(batch)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        return Refusal(Reason.NEEDED, first_line(error)[:120])
    with evaluating(model), masked(model, {unit: mask_of(unit, members) for unit, members in kept_members.items()}):
        whole = model(batch)
    return None if same_outputs(cut, whole) else Refusal(Reason.DEPENDENT)
