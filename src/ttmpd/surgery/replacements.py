"""What replaces a unit that is removed as a whole: an identity, zeros or a linear map."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.models.modules import clone, module_at, replace_module
from ttmpd.models.trace import first_argument
from ttmpd.records import DepthUnit, Form, Unit


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A fitted linear replacement: ``y = weight x + bias``, a map of the channels at every position.

    Args:
        weight: (channels, channels).
        bias: (channels,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, unit: DepthUnit, x: Tensor) -> Tensor:
        """The output for the unit's input, its activation included."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if unit.layout == "channels_last":
            y = F.linear(x, weight, bias)
        else:
            convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
            y = convolve(x, weight[(..., *[None] * (x.dim() - 2))], bias)
        return {"": y, "relu": y.relu(), "relu6": F.relu6(y)}[unit.activation] if unit.activation else y


class PassThrough(nn.Module):
    """Stands where a unit was: hands on its first argument, or what ``inner`` makes of it.

    Used where ``nn.Identity`` does not do: modules that are called with more arguments or answer with a tuple.
    """

    def __init__(self, inner: nn.Module | None = None, form: Form = "arguments") -> None:
        super().__init__()
        self.inner = inner if inner is not None else nn.Identity()
        self.form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``inner`` makes of the first argument, in the form in which the module answered."""
        return shaped(self.inner(first_argument(args, kwargs)), self.form)


class Zero(nn.Module):
    """Stands where the last module of a branch was: zeros of the shape that it answered with.

    Args:
        width: of the answer.
        axis: that holds the channels, counted with the batch.
    """

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.width, self.axis = width, axis

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the shape of ``x``, but for the width."""
        return zeros(x, self.width, self.axis)


def zeros(x: Tensor, width: int, axis: int) -> Tensor:
    """Zeros of the shape of ``x``, but ``width`` along ``axis``."""
    if x.shape[axis] == width:
        return torch.zeros_like(x)
    axis = axis % x.dim()
    return x.new_zeros((*x.shape[:axis], width, *x.shape[axis + 1 :]))


def shaped(value: Tensor, form: Form) -> Any:
    """The value in the form in which a unit answers."""
    return (value,) if form == "tuple" else (value, None) if form == "pair" else value


def wrapped(unit: Unit, new: nn.Module) -> nn.Module:
    """``new`` in the form in which the model calls the unit."""
    form = unit.form if isinstance(unit, DepthUnit) else "plain"
    return new if form == "plain" else PassThrough(new, form)


def put(student: nn.Module, unit: Unit, new: nn.Module) -> None:
    """Set ``new`` in the place of ``unit``, in place."""
    replace_module(student, unit.path, wrapped(unit, new))


def drop(student: nn.Module, unit: DepthUnit) -> None:
    """Take ``unit`` out, in place: its input is handed on, or zeros stand where it was the branch of a sum."""
    for path, form in unit.upstream:
        replace_module(student, path, PassThrough(form=form))
    put(student, unit, Zero(unit.channels, _axis(unit)) if unit.branch else nn.Identity())


def copied_without(model: nn.Module, units: Sequence[DepthUnit]) -> nn.Module:
    """A copy of the model in which what is about to go is not copied, but shared."""
    gone = [module_at(model, path) for unit in units for path in unit.paths]
    return clone(model, shared=gone)


def _axis(unit: DepthUnit) -> int:
    return 1 if unit.layout == "channels_first" else -1


def replacement_at(student: nn.Module, unit: Unit) -> nn.Module:
    """What stands in the place of ``unit``, without its wrapper."""
    module = module_at(student, unit.path)
    return module.inner if isinstance(module, PassThrough) else module


def as_identity(replacement: nn.Module) -> nn.Module:
    """The linear replacement with weights that hand on its input, in place: what its fit is drawn to."""
    layer = replacement[0] if isinstance(replacement, nn.Sequential) else replacement
    with torch.no_grad():
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        if isinstance(layer, nn.Linear):
            nn.init.eye_(layer.weight)
        else:
            nn.init.dirac_(layer.weight)  # type: ignore[arg-type]
    return replacement


def forward_of(unit: Unit, function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A ``forward`` for the unit that returns ``function(input)``, in the form in which the unit answers."""
    return in_form(unit.form if isinstance(unit, DepthUnit) else "plain", function)


def in_form(form: Form, function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A ``forward`` that returns ``function(first argument)``, in the form of the module that it stands for."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return shaped(function(first_argument(args, kwargs)), form)

    return forward


def dropped(unit: Unit, x: Tensor) -> Tensor:
    """What the model goes on with when a depth unit that is given ``x`` is dropped."""
    if isinstance(unit, DepthUnit) and unit.branch:
        return zeros(x, unit.channels, _axis(unit))
    return x
