"""The calibration set: unlabelled samples from the place of use, and those among them that nothing is fitted to."""

from dataclasses import dataclass
from typing import Any

import torch

from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.errors import SamplesError
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.settings import Settings


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The calibration set of a run.

    Args:
        fit: what the teacher is adapted to and the student is fitted on.
        held_out: what the result is compared with the teacher on; nothing is fitted to these.
    """

    fit: Samples
    held_out: Samples

    def __len__(self) -> int:
        return len(self.fit) + len(self.held_out)

    @property
    def ids(self) -> tuple[str, ...]:
        """Content hashes of all samples, those of the held-out ones last."""
        return self.fit.ids + self.held_out.ids


def open_calibration(data: Any, opened: OpenedModel, settings: Settings) -> Calibration:
    """Read samples, and hold some of them out by seed: these speak for all data, whatever is selected from the others.

    Where the selector looks at samples, there are more of them to fit on than are wanted: it chooses.

    Raises:
        SamplesError: fewer than 2 samples would be left to fit on, or none can be read.
    """
    n = max(settings.pool, settings.num_samples) if settings.select.uses_teacher else settings.num_samples
    samples = open_samples(data, opened.preprocessing, num_samples=n, enough=settings.num_samples, seed=settings.seed)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    n = min(len(samples), settings.num_samples)
    n_held_out = min(n - 1, round(n * settings.holdout)) if n > 1 else 0
    if n - n_held_out < 2:
        raise SamplesError(f"a run must have at least 2 samples to fit on, but got {n - n_held_out}; give more samples")
    return Calibration(samples.subset(order[n_held_out:]), samples.subset(order[:n_held_out]))
