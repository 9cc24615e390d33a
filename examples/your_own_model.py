"""Compress a PyTorch model of your own, with a scorer of your own: a class, and no other file."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

import ttmpd
from ttmpd.score.base import Scorer
from ttmpd.testing.tiny_models import tiny_model


class LastFirst(Scorer):
    """Blocks near the end of the model are removed first."""

    source: ClassVar[str] = "an example"
    kinds: ClassVar[tuple[str, ...]] = ("block",)

    def scores(self, job: Any) -> Iterable[ttmpd.Score]:
        """One score for each unit: the less harm, the sooner it is removed."""
        for place, unit in enumerate(job.units):
            yield ttmpd.Score(unit.id, "drop", float(len(job.units) - place))


def main() -> None:
    """Compress to 90 % of the multiply-accumulates."""
    net = tiny_model()  # any nn.Module that predicts classes
    samples = torch.rand(60, 3, 8, 8)  # what it takes, without labels
    quick = {"num_samples": 60, "batch_size": 8, "adapt": "none", "distill": ttmpd.OneTime(steps=5, views=1)}
    result = ttmpd.compress(net, samples, macs=0.9, score=LastFirst(), units=("block",), **quick)
    print("removed:", [removal.unit.id for removal in result.plan.removals])


if __name__ == "__main__":
    main()
