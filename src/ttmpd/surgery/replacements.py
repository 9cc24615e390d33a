"""An identity or a linear map in the place of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.models.modules import module_at, replace_module
from ttmpd.records import Unit


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A fitted stand-in: ``y = weight * x + bias``, a map of the channels at every position.

    Args:
        weight: (channels, channels).
        bias: (channels,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, unit: Unit, x: Tensor) -> Tensor:
        """The stand-in's answer for the unit's input, its activation included."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if unit.layout == "channels_last":
            y = F.linear(x, weight, bias)
        elif x.dim() == 4:
            y = F.conv2d(x, weight[:, :, None, None], bias)
        else:
            y = F.conv1d(x, weight[:, :, None], bias)
        return {"": y, "relu": y.relu(), "relu6": F.relu6(y)}[unit.activation] if unit.activation else y


class PassThrough(nn.Module):
    """Stands where a unit was: hands on its first argument, or what ``inner`` makes of it.

    Used where ``nn.Identity`` does not do: blocks that are called with more arguments or answer with a tuple.
    """

    def __init__(self, inner: nn.Module | None = None, as_tuple: bool = False) -> None:
        super().__init__()
        self.inner = inner if inner is not None else nn.Identity()
        self.as_tuple = as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``inner`` makes of the first argument, as a tuple of one where the unit answered with a tuple."""
        answer = self.inner(_given(args, kwargs))
        return (answer,) if self.as_tuple else answer


def wrapped(unit: Unit, new: nn.Module) -> nn.Module:
    """``new`` in the form in which the model calls the unit."""
    return new if unit.form == "plain" else PassThrough(new, unit.form == "tuple")


def put(student: nn.Module, unit: Unit, new: nn.Module) -> None:
    """Set ``new`` in the place of ``unit``, in place."""
    replace_module(student, unit.path, wrapped(unit, new))


def standing(student: nn.Module, unit: Unit) -> nn.Module:
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


def answering(unit: Unit, function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A ``forward`` for the unit's place that answers with ``function(input)``, for ``modules.stubbed``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        answer = function(_given(args, kwargs))
        return (answer,) if unit.form == "tuple" else answer

    return forward


def _given(args: Any, kwargs: Any) -> Any:
    """What a block is called with first."""
    return args[0] if args else next(iter(kwargs.values()), None)
