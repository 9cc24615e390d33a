"""Stand-ins folded into the layers that read them, where that is exact."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttmpd.models.modules import module_at
from ttmpd.models.run import call, evaluating
from ttmpd.models.trace import trace
from ttmpd.records import Removal, Unit
from ttmpd.surgery.replacements import put, standing


def fold(student: nn.Module, removals: Sequence[Removal], batch: Tensor, tolerance: float = 1e-4) -> int:
    """Fold stand-ins without activation into the linear layer that reads them, where that is exact. In place.

    The reader is the next layer in calling order; whether it is the *only* reader is settled by numbers: the fold is
    kept when the model's output stays within ``tolerance`` of its scale, else it is undone.

    Returns:
        How many stand-ins became identities.
    """
    folded = 0
    with evaluating(student):
        for removal in removals:
            if removal.action == "linear" and not removal.unit.activation:
                folded += _fold_one(student, removal.unit, batch, tolerance)
    return folded


def _fold_one(student: nn.Module, unit: Unit, batch: Tensor, tolerance: float) -> int:
    own = standing(student, unit)
    reader = _next_layer(student, unit, batch)
    if reader is None or not isinstance(own, nn.Linear | nn.Conv2d) or own.bias is None:
        return 0
    before = call(student, batch)
    old_weight, old_bias = reader.weight, reader.bias
    flat = old_weight.flatten(1).double() @ own.weight.flatten(1).double()
    shift = old_weight.flatten(1).double() @ own.bias.double()
    bias = shift if old_bias is None else shift + old_bias.double()
    reader.weight = nn.Parameter(flat.view_as(old_weight).to(old_weight.dtype))
    reader.bias = nn.Parameter(bias.to(old_weight.dtype))
    put(student, unit, nn.Identity())
    if torch.allclose(call(student, batch), before, rtol=0, atol=tolerance * float(before.abs().max())):
        return 1
    reader.weight, reader.bias = old_weight, old_bias
    put(student, unit, own)
    return 0


def _next_layer(student: nn.Module, unit: Unit, batch: Tensor) -> nn.Linear | nn.Conv2d | None:
    """The first layer with weights that runs after the unit, if it is a matrix or a 1x1 convolution as wide as it."""
    layers = {
        name for name, m in student.named_modules() if not list(m.children()) and list(m.parameters(recurse=False))
    }
    order = trace(student, batch, paths={unit.path, *layers}).order
    later = order[order.index(unit.path) + 1 :]
    after = [name for name in later if name in layers and not name.startswith(f"{unit.path}.")]
    layer = module_at(student, after[0]) if after else None
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer if layer.in_channels == unit.channels and layer.padding == (0, 0) else None
    return layer if isinstance(layer, nn.Linear) and layer.in_features == unit.channels else None
