"""Parameters of a student that are not trained: its output layer, and what runs before the first removed unit."""

from torch import Tensor, nn

from ttmpd.models.modules import module_at
from ttmpd.models.taps import find_output_layer
from ttmpd.models.trace import trace


def freeze(student: nn.Module, first: str, batch: Tensor) -> list[nn.Parameter]:
    """Freeze the head and, where ``first`` names a module, all layers that run before it.

    Where nothing would be left to train, only the head is frozen.

    Returns:
        The parameters that were frozen, for the caller to thaw.
    """
    frozen = freeze_head(student, batch)
    if not first:
        return frozen
    before = freeze_before(student, first, batch)
    if any(parameter.requires_grad for parameter in student.parameters()):
        return frozen + before
    for parameter in before:
        parameter.requires_grad_(True)
    return frozen


def freeze_head(student: nn.Module, batch: Tensor) -> list[nn.Parameter]:
    """Freeze the layer that gives the logits; returns the parameters that were frozen."""
    head = find_output_layer(student, batch)
    if head is None:
        return []
    frozen = [p for p in module_at(student, head).parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def freeze_before(student: nn.Module, path: str, batch: Tensor) -> list[nn.Parameter]:
    """Freeze the layers that run before the module at ``path``; returns the parameters that were frozen.

    Before the first removed unit the student *is* the teacher. Nothing there needs to change, and neither gradients nor
    activations have to be kept: in networks whose first layers are the largest, that is most of a step.
    """
    layers = {name: m for name, m in student.named_modules() if any(True for _ in m.parameters(recurse=False))}
    order = trace(student, batch, paths={path, *layers}).order
    start = order.index(path)
    frozen = []
    for name in sorted((set(order[:start]) - set(order[start:])) & set(layers)):
        layers[name].eval()
        if not list(layers[name].children()):  # what a container holds by itself may be used anywhere
            frozen += [p for p in layers[name].parameters(recurse=False) if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen
