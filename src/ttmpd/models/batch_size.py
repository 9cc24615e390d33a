"""How many samples fit in memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ttmpd.models.run import evaluating, predict


def stored_bytes(loss: Callable[[], Tensor]) -> int:
    """What ``loss()`` keeps for its backward pass, parameters left out: the memory that grows with the batch."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not (value.is_leaf and value.requires_grad):
            storage = value.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss()
    return sum(kept.values())


def activation_limit(device: torch.device) -> int:
    """Bytes that the activations of one step may take: a quarter of a GPU's memory, 384 MiB elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 4
    return 3 << 27


def samples_that_fit(model: nn.Module, few: Tensor, wanted: int) -> int:
    """How many samples, ``wanted`` at most, a training step may have by the memory that their activations take.

    Args:
        model: on its device.
        few: (B, ...) some samples there.
        wanted: so many if there is room.
    """
    with evaluating(model, gradients=True):
        each = stored_bytes(lambda: predict(model, few).sum()) // len(few)
    return min(wanted, max(1, activation_limit(few.device) // max(1, each)))
