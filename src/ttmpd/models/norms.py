"""Normalisation layers: their scale and shift, and where batch normalisation takes its statistics from."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ttmpd.models.run import evaluating

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scale and shift of every normalisation layer, shared ones once."""
    layers = [module for module in model.modules() if isinstance(module, NORMS)]
    parameters = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
    return list(parameters.values())


@contextlib.contextmanager
def using_batch_statistics(model: nn.Module) -> Iterator[None]:
    """While active, batch normalisation takes the statistics of the batch; those it holds stay as they are."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            # Told not to track, a layer in train mode leaves its own statistics and its counter alone.
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking


@contextlib.contextmanager
def learning(model: nn.Module, batch_statistics: bool = False) -> Iterator[None]:
    """Eval mode, with gradients for scale and shift of normalisation alone; all flags are as found afterwards."""
    statistics = using_batch_statistics(model) if batch_statistics else contextlib.nullcontext()
    with evaluating(model, gradients=True), statistics:
        model.requires_grad_(False)
        for parameter in norm_parameters(model):
            parameter.requires_grad_(True)
        yield
