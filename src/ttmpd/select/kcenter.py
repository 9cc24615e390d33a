"""Cover the pool, so that every sample has a chosen one near it."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.select.base import Selector, answers, head_tap


class KCenter(Selector):
    """Farthest-first on the features before the head: at most twice the best largest distance to a chosen sample."""

    source: ClassVar[str] = (
        "Gonzalez, 1985: greedy k-center, a 2-approximation; on network features as in Sener and Savarese, ICLR 2018 "
        "(arXiv 1708.00489), without their mixed-integer step; logits where no single layer gives them"
    )

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """The first is drawn by seed. Samples whose features are not finite come last.

        Cost: one forward pass per sample, and n x len(pool) distances.
        """
        features = answers(teacher, pool, head_tap(teacher, pool), batch_size)[1]
        return farthest_first(features, n, seed)


def farthest_first(features: Tensor, n: int, seed: int = 0) -> list[int]:
    """Positions of ``n`` rows in the order of choice; each is the farthest from those before it.

    Args:
        features: (N, width).
        n: at most N.
        seed: draws the first.
    """
    finite = torch.isfinite(features).all(-1)
    points = torch.where(finite[:, None], features, 0.0).double()
    points = points - points.mean(0)  # squared distances as below lose less to rounding
    squares = points.square().sum(-1)
    # What may be chosen next has the greatest value; rows that are not finite only when nothing else is left.
    nearest = torch.where(finite, torch.inf, -1.0).to(points.dtype)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = []
    for _ in range(n):
        place = int(nearest.argmax()) if chosen else int(order[finite[order].double().argmax()])
        chosen.append(place)
        distance = (squares + squares[place] - 2 * (points @ points[place])).clamp_min(0.0)
        nearest = torch.where(finite, torch.minimum(nearest, distance), nearest)
        nearest[place] = -2.0
    return chosen
