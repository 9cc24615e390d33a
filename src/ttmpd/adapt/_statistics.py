"""Statistics of batch normalisation, moved towards those of the data: layer by layer, in one pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ttmpd.data.samples import Samples
from ttmpd.models.modules import hooks
from ttmpd.models.run import evaluating, predictions_of
from ttmpd.models.trace import first_argument

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance that each layer holds, by its path."""


def layers_with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Path -> layer, of all that normalise by statistics they hold."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def statistics_of(model: nn.Module) -> Statistics:
    """A copy of the statistics that the layers hold."""
    layers = layers_with_statistics(model)
    return {name: (mean.clone(), variance.clone()) for name, (mean, variance) in _buffers(layers).items()}


def load_statistics(model: nn.Module, statistics: Statistics) -> None:
    """Put the statistics into the layers, in place."""
    for name, held in _buffers(layers_with_statistics(model)).items():
        for buffer, value in zip(held, statistics[name], strict=True):
            buffer.copy_(value)


def predictions_and_order(model: nn.Module, samples: Samples, batch_size: int) -> tuple[Tensor, tuple[str, ...]]:
    """(rows, values) predictions, and the paths of the layers that hold statistics, in the order in which they run."""
    order: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _layer, _args, name=name: order.setdefault(name))
        for name, layer in layers_with_statistics(model).items()
    ]
    with hooks(handles):
        outputs = predictions_of(model, samples, batch_size)
    return outputs, tuple(order)


def mix_statistics(model: nn.Module, samples: Samples, batch_size: int, shares: Mapping[str, float]) -> None:
    """Make the statistics of layers (1 - share) x their own + share x those of the data, in place.

    A layer is given what the layers before it make of the data with *their* mixed statistics. These are gathered over
    all batches so far, so that only the first batches are normalised by few samples.

    Args:
        model: changed in place; its mode stays.
        samples: from which the statistics are taken, at least two.
        batch_size: samples per forward pass; one alone is made two, since a single sample may have no variance.
        shares: path of a layer -> share from 0 to 1; layers that are not named stay as they are.

    Cost: one forward pass per sample.
    """
    layers = {name: layer for name, layer in layers_with_statistics(model).items() if shares.get(name, 0.0) > 0}
    mixing = [(layer, _Mixing(layer, shares[name])) for name, layer in layers.items()]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in mixing]
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), hooks(handles):
        for batch in samples.batches(max(2, batch_size), device):
            model(batch)


class _Mixing:
    """A hook that puts into a layer, before it runs, the mixture with the moments of all that it was given so far."""

    def __init__(self, layer: _BatchNorm, share: float) -> None:
        self.share = share
        self.source = tuple(buffer.clone() for buffer in _held(layer))
        self.n = 0.0
        self.mean, self.variance = (torch.zeros_like(buffer, dtype=torch.float32) for buffer in self.source)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = first_argument(args, kwargs).detach().float()
        axes = [axis for axis in range(value.dim()) if axis != 1]
        variance, mean = torch.var_mean(value, axes, correction=0)
        n_new = value.numel() / value.shape[1]
        self.n += n_new
        # Two sets of values joined: the variance of both together (Chan et al., 1979), exact where means are large.
        part, apart = n_new / self.n, mean - self.mean
        self.mean += part * apart
        self.variance.lerp_(variance, part).add_(part * (1 - part) * apart.square())
        assert isinstance(layer, _BatchNorm)
        for buffer, source, data in zip(_held(layer), self.source, (self.mean, self.variance), strict=True):
            buffer.copy_(torch.lerp(source.float(), data, self.share))


def _held(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _buffers(layers: Mapping[str, _BatchNorm]) -> Statistics:
    return {name: _held(layer) for name, layer in layers.items()}
