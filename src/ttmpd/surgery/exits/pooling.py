"""Pool a block's output into one short vector per sample, which an exit reads."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ttmpd.records import Layout

Pool = Literal["flat", "mean", "grid", "tokens"]
POOLS: tuple[Pool, ...] = ("flat", "mean", "grid", "tokens")

GRID = 2
MAX_WEIGHTS = 1 << 19
"""The head of an exit has at most so many; where a grid would need more, the plain mean over positions is read."""


def choose_pool(shape: Sequence[int], layout: Layout, n_classes: int) -> Pool:
    """The pooling for outputs of this shape.

    The mean over the positions of an image forgets where things are, which the first blocks of a network know and have
    not yet turned into channels; so images are read as the means of their quarters, and the highest of all values.
    Tokens are read as the mean over all of them: only the last blocks of a frozen transformer gather the answer in the
    token that its head reads.

    Args:
        shape: of the output for one sample.
        layout: which axis of it holds the channels.
        n_classes: of the model.
    """
    if len(shape) == 1:
        return "flat"
    if len(shape) == 2 and layout == "channels_last":
        return "tokens"
    sides = shape[1:] if layout == "channels_first" else shape[:-1]
    if len(sides) != 2 or min(sides) < GRID or width("grid", shape, layout) * n_classes > MAX_WEIGHTS:
        return "mean"
    return "grid"


def width(pool: Pool, shape: Sequence[int], layout: Layout) -> int:
    """Length of the vector that is read of one sample."""
    channels = shape[0] if layout == "channels_first" else shape[-1]
    return channels * (GRID * GRID + 1) if pool == "grid" else channels


def pooled(value: Tensor, pool: Pool, layout: Layout, token_mask: Tensor | None = None) -> Tensor:
    """(B, width) float32.

    Args:
        value: (B, ...) a block's output.
        pool: from :func:`choose_pool`.
        layout: which axis holds the channels.
        token_mask: (B, S) true for tokens that are no padding; None where all count.
    """
    x = value.float()
    if pool == "flat":
        return x
    if pool == "tokens":
        # A model that adds tokens of its own, or joins some, is read over all it has.
        if token_mask is None or token_mask.shape != x.shape[:2]:
            return x.mean(1)
        return (x * token_mask.unsqueeze(-1)).sum(1) / token_mask.sum(1, keepdim=True).clamp_min(1)
    x = x if layout == "channels_first" else x.movedim(-1, 1)
    if pool == "mean":
        return x.flatten(2).mean(2)
    quarters = F.adaptive_avg_pool2d(x, GRID).flatten(1)
    return torch.cat([quarters, x.amax((2, 3))], 1)
