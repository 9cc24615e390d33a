"""Multiply-accumulate operations of a model."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ttmpd.models.run import evaluating


def count_macs(model: nn.Module, batch: Tensor) -> dict[str, int]:
    """Multiply-accumulates per sample of every module by path; the whole model under ""."""
    with evaluating(model), _in_parts(), FlopCounterMode(display=False) as counter:
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # the counter follows gradients even where there are none
        model(batch)
    root = type(model).__name__
    macs = {"": counter.get_total_flops() // 2 // len(batch)}
    for name, counts in counter.get_flop_counts().items():
        path = name.removeprefix(root).lstrip(".")
        if path and name != "Global":
            macs[path] = sum(counts.values()) // 2 // len(batch)
    return macs


@contextlib.contextmanager
def _in_parts() -> Iterator[None]:
    """While active, attention and torch's own transformer layers run as the operations they consist of.

    Fused, they are counted on some devices and on others not.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
