"""How often a linear replacement could be folded into the layer that reads it, and what that would bring.

    python benchmarks/folding.py     # two minutes on one core

Random weights: the families of ``families.py`` and four CNNs at 64x64. Every removable block gets a linear replacement
by itself; it is folded into the next layer where that leaves the model's outputs as they are. Columns: blocks; those
whose replacement ends without an activation, the only ones that could be folded; those that were; and the largest share
of the model's multiply-accumulates that one of these saved. Writes results/folding.csv.
"""

import copy

import torch
import torchvision
from torch import Tensor, nn

from common import write_csv
from families import FAMILIES, built
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import module_at
from ttmpd.models.run import evaluating
from ttmpd.models.trace import trace
from ttmpd.records import DepthUnit, Removal
from ttmpd.surgery.cut import skeleton
from ttmpd.surgery.find import find_units
from ttmpd.surgery.replacements import put, replacement_at

CNNS = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "resnet18")


def folds(student: nn.Module, unit: DepthUnit, batch: Tensor) -> bool:
    """Fold the unit's replacement into the next layer, in place; False where that changes the outputs."""
    linear, reader = replacement_at(student, unit), next_layer(student, unit, batch)
    if reader is None or not isinstance(linear, nn.Linear | nn.Conv2d):
        return False
    with evaluating(student):
        before = trace(student, batch, paths=()).output
        weight = reader.weight.flatten(1).double()
        assert linear.bias is not None
        shift = weight @ linear.bias.double() + (0 if reader.bias is None else reader.bias.double())
        reader.weight = nn.Parameter((weight @ linear.weight.flatten(1).double()).view_as(reader.weight).float())
        reader.bias = nn.Parameter(shift.float())
        put(student, unit, nn.Identity())
        after = trace(student, batch, paths=()).output
    before, after = (getattr(output, "logits", output) for output in (before, after))
    return torch.allclose(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))


def next_layer(student: nn.Module, unit: DepthUnit, batch: Tensor) -> nn.Linear | nn.Conv2d | None:
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


def row(name: str, model: nn.Module, batch: Tensor) -> dict[str, object]:
    units = find_units(model, batch, ["block"]).units
    plain = [unit for unit in units if isinstance(unit, DepthUnit) and not unit.activation]
    macs, saved = count_macs(model, batch)[""], []
    for unit in plain:
        student = skeleton(model, [Removal(unit, "linear")])
        folded = copy.deepcopy(student)
        if folds(folded, unit, batch):
            saved.append((count_macs(student, batch)[""] - count_macs(folded, batch)[""]) / macs)
    most = round(100 * max(saved, default=0.0), 2)
    return {"model": name, "blocks": len(units), "plain": len(plain), "folded": len(saved), "most_macs_percent": most}


def main() -> None:
    rows = []
    for family in FAMILIES:
        model, inputs = built(family)
        rows.append(row(family, model, inputs[:2]))
        print(rows[-1], flush=True)
    for name in CNNS:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, num_classes=10).eval()
        rows.append(row(name, model, torch.randn(2, 3, 64, 64)))
        print(rows[-1], flush=True)
    write_csv("folding.csv", rows)


if __name__ == "__main__":
    main()
