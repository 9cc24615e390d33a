"""What every command does first: copy the model to its device, open the calibration set, size the passes."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.errors import SamplesError
from ttmpd.latency.device import choose_device
from ttmpd.models.batch_size import ActivationMemory, measure_activations
from ttmpd.models.modules import clone
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.calibration import Calibration, open_calibration
from ttmpd.pipeline.settings import Settings
from ttmpd.surgery.exits.model import check_without_exits
from ttmpd.tasks.base import Task
from ttmpd.training.task import NOT_FINITE, answered, assign_task, check_structure

PASS_SIZE = 64
"""Samples per pass, if memory has room, where latency is measured on fewer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A model that can be run on the calibration set.

    Args:
        opened: where the model came from.
        source: a copy of it as it is, on the device, in eval mode.
        calibration: the samples; from those to fit on a selector may still choose some.
    """

    opened: OpenedModel
    source: nn.Module
    calibration: Calibration

    @property
    def device(self) -> torch.device:
        """Where the copy of the model is."""
        return next(self.source.parameters()).device

    @functools.cached_property
    def memory(self) -> ActivationMemory:
        """What the model's activations take; measured once per run, when it is first asked for."""
        return measure_activations(self.source, self._two_samples)

    def step_size(self, batch_size: int) -> int:
        """Samples per pass with gradients: as many as latency is measured on, and no fewer than do well."""
        if batch_size >= PASS_SIZE:
            return batch_size
        return max(batch_size, self.memory.samples(self._n_values, at_most=PASS_SIZE))

    def pass_size(self, at_most: int) -> int:
        """Samples per pass without gradients: twice as many as a training step may have, which keeps what they need."""
        return min(at_most, 2 * self.memory.samples(self._n_values, at_most=at_most))

    @property
    def _two_samples(self) -> Tensor:
        return self.calibration.fit.trimmed(slice(0, 2), self.device)

    @property
    def _n_values(self) -> int:
        return self._two_samples[0].numel()


def prepare(opened: OpenedModel, data: Any, settings: Settings) -> Prepared:
    """Open the samples, hold some of them out, and copy the model to the device.

    Args:
        opened: left untouched.
        data: unlabelled samples, whatever :func:`ttmpd.compress` takes.
        settings: of the run.

    Raises:
        SamplesError: there are too few samples, or none can be read.
        ModelError: the model does not run on them.
        UnsupportedError: the model has exits.
    """
    check_without_exits(opened.module)
    calibration = open_calibration(data, opened, settings)
    device = choose_device(settings.device)
    first_samples = calibration.fit.first(4).trimmed(slice(None), device)
    source = working_copy(opened, first_samples, settings.task)
    parts = (answered(source, part, settings.batch_size) for part in (calibration.fit, calibration.held_out) if part)
    fit, held_out = (*parts, calibration.held_out)[:2]
    skipped = dict.fromkeys((*fit.skipped, *held_out.skipped))  # reports ask the samples of the fit
    fit = dataclasses.replace(fit, skipped=tuple(skipped))
    if len(fit) < 2:
        raise SamplesError(f"a run must have at least 2 samples to fit on, but {NOT_FINITE} for all but {len(fit)}")
    return Prepared(opened, source, Calibration(fit, held_out))


def working_copy(opened: OpenedModel, batch: Tensor, task: Task | None = None) -> nn.Module:
    """A copy of the model as it is, in eval mode on the device of a batch, with the task that it was found to have.

    What its owner froze is frozen for another training: students of it learn in all of their layers.

    Args:
        opened: left untouched.
        batch: (B, ...) a few samples; the model has to run on them.
        task: what the model predicts; None detects it.

    Raises:
        ModelError: the model does not run on the batch, or answers otherwise in train mode.
        UnsupportedError: the model has exits.
    """
    check_without_exits(opened.module)
    source = clone(opened.module).to(batch.device).eval()
    for parameter in source.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    assign_task(source, batch, task, opened.preprocessing)
    check_structure(source, batch)
    return source


def latency_batch(source: nn.Module, samples: Samples, settings: Settings) -> Tensor:
    """The batch on which latency is measured, on the model's device; text is as long as the longest sample in it.

    Which samples are in it depends on their contents, not on their order: lengths are mixed as in the data.
    """
    by_id = torch.tensor(sorted(range(len(samples)), key=samples.ids.__getitem__))
    index = by_id[torch.arange(settings.batch_size) % len(samples)]
    return samples.trimmed(index, next(source.parameters()).device)
