"""How many samples fit in memory: the activations of one training step are measured, everything else is arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.models.run import evaluating, predict


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """What the activations of a training step take; measured once by :func:`measure_activations`.

    Args:
        bytes_per_value: activations per value of the input: per pixel and channel, or per token.
        limit: bytes that the activations of one step may take.
    """

    bytes_per_value: float
    limit: int

    def samples(self, n_values: int, *, at_most: int) -> int:
        """How many samples a training step may have.

        Args:
            n_values: pixels and channels, or tokens, of one sample.
            at_most: so many if there is room.

        Example:
            >>> ActivationMemory(bytes_per_value=4.0, limit=1000).samples(10, at_most=64)
            25
        """
        return min(at_most, max(1, self.limit // max(1, int(self.bytes_per_value * n_values))))


def measure_activations(model: nn.Module, batch: Tensor) -> ActivationMemory:
    """Measure what a training step of a model keeps in memory for its backward pass.

    Args:
        model: on its device; left untouched.
        batch: (B, ...) a few samples there.

    Cost: one pass with gradients.
    """
    with evaluating(model, gradients=True):
        n_bytes = stored_bytes(lambda: predict(model, batch).sum())
    return ActivationMemory(n_bytes / batch.numel(), activation_limit(batch.device))


def stored_bytes(loss: Callable[[], Tensor]) -> int:
    """What ``loss()`` keeps for its backward pass, parameters left out: the memory that grows with the batch."""
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not (value.is_leaf and value.requires_grad):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss()
    return sum(storages.values())


def activation_limit(device: torch.device) -> int:
    """Bytes that the activations of one step may take: a quarter of a GPU's memory, 384 MiB elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 4
    return 3 << 27
