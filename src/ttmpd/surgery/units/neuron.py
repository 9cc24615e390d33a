"""Hidden neurons of MLPs, found by what feeds a layer: nothing but element-wise functions of other layers' outputs."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.method import check_fields
from ttmpd.models.modules import module_at
from ttmpd.models.tiny import tiny_tokens, tiny_transformer
from ttmpd.records import WidthUnit
from ttmpd.surgery.graph import Call, calls_of, producers_of
from ttmpd.surgery.layers import ROUND, is_layer, matrix_of, n_axes, spread_out, take_inputs, take_outputs
from ttmpd.surgery.masks import proven
from ttmpd.surgery.observation import Observation
from ttmpd.surgery.units.base import UnitSearch, WidthUnits

_ELEMENTWISE = {
    "Gelu", "Silu", "Relu", "Mul", "Add", "Sub", "Div", "Pow", "Tanh", "Sigmoid", "Hardswish", "Hardtanh", "LeakyRelu",
    "Elu", "Softplus", "Mish", "Hardsigmoid", "NativeDropout", "Clone", "ToCopy", "Alias",
}  # fmt: skip
_SHAPING = {"View", "UnsafeView", "ReshapeAlias", "T", "Permute", "Transpose", "Contiguous"}
_PARTING = {"Split", "SplitWithSizes", "Slice", "Unbind", "Chunk"}


class Neuron(WidthUnits):
    """Hidden neurons between two layers of an MLP, gated ones (SwiGLU) included.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 3))
        >>> [(unit.path, unit.n_members, unit.producers) for unit in Neuron().find(mlp, torch.zeros(2, 4)).units]
        [('2', 32, ('0',))]
    """

    source: ClassVar[str] = "KCM (ICML 2023), Kwon et al. (NeurIPS 2022): FFN filters; found here in the autograd graph"
    least: int = 16
    """Layers with fewer hidden neurons are left alone."""
    parts: int = 16
    """Into how many widths a layer is divided."""
    last: bool = False
    """Whether the neurons that the layer of the logits reads can go, too. They are the final features that scorers and
    distillation compare, so leave them to methods that look at neither."""

    def __post_init__(self) -> None:
        check_fields(self, least=2, parts=1)

    def search(self, observation: Observation) -> UnitSearch:
        """The hidden layers of at least ``least`` neurons, in the order of the network."""
        model, calls = observation.model, calls_of(observation, is_layer)
        head = None if self.last else observation.output_layer  # its input is what distillation compares
        producers = {path: _producers(model, path, calls) for path in calls if path != head}
        units = [
            self._sized(_unit(model, path, makers, calls[path], observation.macs))
            for path, makers in producers.items()
            if makers and len(matrix_of(module_at(model, path))[0]) >= self.least
        ]
        shared = [maker for makers in producers.values() for maker in makers]
        units = [unit for unit in units if all(shared.count(producer) == 1 for producer in unit.producers)]
        removable, refused = proven(self.narrow, model, units, observation.batch[:2])
        return UnitSearch(tuple(removable), refused)

    def _sized(self, unit: WidthUnit) -> WidthUnit:
        """With equal steps down to the last one, in multiples of 8 where there are enough."""
        step = ROUND if unit.n_members >= ROUND**2 else 1
        shares = (unit.n_members * (self.parts - i) / self.parts for i in range(1, self.parts))
        counts = (max(step, round(share / step) * step) for share in shares)
        return dataclasses.replace(unit, widths=tuple(dict.fromkeys(n for n in counts if n < unit.n_members)))

    def example(self, n: int = 4) -> tuple[nn.Module, Tensor]:
        """Two transformer blocks, and tokens for them."""
        return tiny_transformer(), tiny_tokens(n)

    def narrow(self, student: nn.Module, unit: WidthUnit, kept_members: Sequence[int]) -> None:
        """Rows of the producers and columns of the layer behind them."""
        index = spread_out(kept_members, 1)
        for path in unit.producers:
            layer = module_at(student, path)
            n_parts = matrix_of(layer).shape[0] // unit.n_members  # gate and value in one matrix
            take_outputs(layer, torch.cat([index + part * unit.n_members for part in range(n_parts)]))
        take_inputs(module_at(student, unit.path), index)


def _producers(model: nn.Module, path: str, calls: dict[str, Call]) -> tuple[str, ...]:
    """The layers that make what the layer reads, element by element; () when their sizes do not fit."""
    producers, met = producers_of(path, calls, _ELEMENTWISE | _SHAPING | _PARTING)
    n_in = matrix_of(module_at(model, path)).shape[1]
    sizes = {len(matrix_of(module_at(model, name))) for name in producers}
    return producers if sizes == {n_in} or (met & _PARTING and sizes == {2 * n_in}) else ()


def _unit(model: nn.Module, path: str, producers: tuple[str, ...], call: Call, macs: dict[str, int]) -> WidthUnit:
    layer = module_at(model, path)
    parts = [module_at(model, name) for name in producers]
    weights = sum(matrix_of(part).numel() for part in (*parts, layer))
    biases = sum(len(part.bias) for part in parts if isinstance(part.bias, Tensor))
    return WidthUnit(
        kind="neuron",
        path=path,
        module=type(layer).__name__,
        shape=call.outputs,
        layout="channels_first" if n_axes(layer) else "channels_last",
        n_params=weights + biases,
        macs=macs.get(path, 0) + sum(macs.get(name, 0) for name in producers),
        n_members=matrix_of(layer).shape[1],
        consumers=(path,),
        producers=producers,
    )
