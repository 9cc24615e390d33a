"""Re-estimate the normalisation statistics on the data and mix them with the source's, without labels."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.data.samples import Samples
from ttmpd.method import check_range
from ttmpd.models.modules import clone
from ttmpd.models.run import evaluating, predictions_of
from ttmpd.progress import track
from ttmpd.training.task import task_of

Statistics = dict[str, tuple[Tensor, Tensor]]


class Norm(Adapter):
    """Statistics = (1 - w) x source + w x data; w is chosen by information maximisation.

    The mixing weight maximises the entropy of the mean prediction minus the mean entropy, so that predictions are
    confident and varied. No constant fits all data: equal shares are best for JPEG artefacts, nearly all of the data
    for noise.
    """

    source: ClassVar[str] = (
        "statistics mixing: Schneider et al., 2020 (arXiv 2006.16971); weight by information maximisation "
        "(Krause et al., 2010), this project's choice"
    )
    weights: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Candidates for w; 0 leaves the teacher as it is."""
    max_samples: int = 512

    def __post_init__(self) -> None:
        for weight in self.weights:
            check_range("norm.weights", weight, 0.0, 1.0)

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """A copy of the teacher with mixed statistics, or the teacher itself when it has none.

        Cost: one pass per candidate weight and one for the statistics.
        """
        if not _layers(teacher):
            return Adapted(teacher, "nothing to do: the model has no batch statistics")
        task = task_of(teacher)
        if task.reason_not_to_adapt:
            return Adapted(teacher, f"nothing done: {task.reason_not_to_adapt}")
        if len(samples) < 2:
            return Adapted(teacher, "nothing done: statistics need at least two samples")
        subset = samples.first(self.max_samples)
        adapted = clone(teacher)
        source = _statistics(adapted)
        data = _estimated(adapted, subset, batch_size)
        information: dict[float, float] = {}
        for weight in track(self.weights, "adapt", len(self.weights)):
            _load(adapted, source, data, weight)
            information[weight] = float(task.information(predictions_of(adapted, subset, batch_size)))
        best = max(information, key=lambda w: information[w])
        _load(adapted, source, data, best)
        note = f"normalisation statistics mixed, {best:.0%} from {len(subset)} samples"
        facts = {"weight": best, "information": information[best]}
        if 0.0 in information:
            facts["information_source"] = information[0.0]
        return Adapted(adapted, note, facts)


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _statistics(model: nn.Module) -> Statistics:
    statistics: Statistics = {}
    for name, layer in _layers(model).items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        statistics[name] = (layer.running_mean.clone(), layer.running_var.clone())
    return statistics


def _estimated(model: nn.Module, samples: Samples, batch_size: int) -> Statistics:
    """Statistics of each layer's inputs, averaged over batches, while the layers before it use batch statistics."""
    device = next(model.parameters()).device
    layers = _layers(model)
    before = {name: (layer.momentum, layer.num_batches_tracked) for name, layer in layers.items()}
    with evaluating(model):
        for layer in layers.values():
            layer.train()
            layer.num_batches_tracked = torch.tensor(0, device=device)
            layer.momentum = None  # cumulative average
        # The last batch joins the one before it: a batch of one has no variance.
        batch_size = max(2, batch_size)
        starts = list(range(0, len(samples), batch_size))
        if len(starts) > 1 and len(samples) - starts[-1] < max(2, batch_size // 2):
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], len(samples)], strict=True):
            with torch.no_grad():
                model(samples.batch(slice(start, stop), device))
    for name, layer in layers.items():
        layer.momentum, layer.num_batches_tracked = before[name]
    return _statistics(model)


def _load(model: nn.Module, source: Statistics, data: Statistics, weight: float) -> None:
    for name, layer in _layers(model).items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(torch.lerp(source[name][0], data[name][0], weight))
        layer.running_var.copy_(torch.lerp(source[name][1], data[name][1], weight))
