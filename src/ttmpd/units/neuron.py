"""Hidden neurons of MLPs, found by what feeds a layer: nothing but element-wise functions of other layers' outputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttmpd.method import check_fields
from ttmpd.modules import call, count_macs, evaluating, find_head, hooks, module_at
from ttmpd.records import Unit
from ttmpd.units._members import ROUND, is_layer, matrix_of, proven, spread_out, take_inputs, take_outputs
from ttmpd.units.base import Found, Narrow

_ELEMENTWISE = {
    "Gelu", "Silu", "Relu", "Mul", "Add", "Sub", "Div", "Pow", "Tanh", "Sigmoid", "Hardswish", "Hardtanh", "LeakyRelu",
    "Elu", "Softplus", "Mish", "Hardsigmoid", "NativeDropout", "Clone", "ToCopy", "Alias",
}  # fmt: skip
_SHAPING = {"View", "UnsafeView", "ReshapeAlias", "T", "Permute", "Transpose", "Contiguous"}
_PARTING = {"Split", "SplitWithSizes", "Slice", "Unbind", "Chunk"}


class Neuron(Narrow):
    """Hidden neurons between two layers of an MLP, gated ones (SwiGLU) included.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 3))
        >>> [(unit.path, unit.members, unit.feeders) for unit in Neuron().find(mlp, torch.zeros(2, 4)).units]
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

    def find(self, model: nn.Module, batch: Tensor) -> Found:
        """The hidden layers of at least ``least`` neurons, in the order of the network."""
        calls = _calls(model, batch)
        head = None if self.last else find_head(model, batch)  # its input is what distillation compares
        feeders = {path: _feeders(path, calls) for path in calls if path != head}
        macs = count_macs(model, batch)
        units = [
            self._sized(_unit(model, path, found, calls[path], macs))
            for path, found in feeders.items()
            if found and len(matrix_of(module_at(model, path))[0]) >= self.least
        ]
        shared = [f for found in feeders.values() for f in found]
        units = [unit for unit in units if all(shared.count(feeder) == 1 for feeder in unit.feeders)]
        kept, refused = proven(self, model, units, batch[:2])
        return Found(tuple(kept), tuple(refused.items()))

    def _sized(self, unit: Unit) -> Unit:
        """With equal steps down to none at all, in multiples of 8."""
        step = ROUND if unit.members >= ROUND**2 else 1
        shares = (unit.members * (self.parts - i) / self.parts for i in range(1, self.parts + 1))
        least = 0 if unit.module == "Linear" else 1  # convolutions and Hugging Face's own layer cannot read nothing
        counts = (max(least, round(share / step) * step) for share in shares)
        return dataclasses.replace(unit, widths=tuple(dict.fromkeys(n for n in counts if n < unit.members)))

    def narrow(self, student: nn.Module, unit: Unit, kept: Sequence[int]) -> None:
        """Rows of the feeders and columns of the layer behind them."""
        index = spread_out(kept, 1)
        for path in unit.feeders:
            layer = module_at(student, path)
            n_parts = matrix_of(layer).shape[0] // unit.members  # gate and value in one matrix
            take_outputs(layer, torch.cat([index + part * unit.members for part in range(n_parts)]))
        take_inputs(module_at(student, unit.path), index)


class _Call:
    """What was seen of a layer: how often it ran, and where its input and output stand in the autograd graph."""

    def __init__(self) -> None:
        self.count = 0
        self.given: Any = None
        self.made: Any = None
        self.shape: tuple[int, ...] = ()
        self.n_in = self.n_out = 0


def _calls(model: nn.Module, batch: Tensor) -> dict[str, _Call]:
    """Every layer that ran, in calling order, with the graph of one pass."""
    seen: dict[str, _Call] = {}

    def note(path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        record = seen.setdefault(path, _Call())
        record.count += 1
        record.given, record.made, record.shape = args[0].grad_fn, output.grad_fn, tuple(output.shape[1:])
        record.n_out, record.n_in = matrix_of(layer).shape

    layers = [(path, module) for path, module in model.named_modules() if is_layer(module)]
    handles = [m.register_forward_hook(lambda m, a, out, p=path: note(p, m, a, out)) for path, m in layers]
    with evaluating(model, gradients=True), hooks(handles):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        call(model, batch)
    return seen


def _feeders(path: str, calls: dict[str, _Call]) -> tuple[str, ...]:
    """The layers whose outputs, and nothing else, make the layer's input element by element; () when that fails."""
    record = calls[path]
    makers = {other.made: name for name, other in calls.items() if other.count == 1 and name != path}
    found: dict[str, None] = {}
    parted = False
    stack, visited = [record.given], set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue  # a constant, or seen
        visited.add(node)
        kind = str(node.name()).rpartition("::")[2].partition("Backward")[0]
        if node in makers:
            found[makers[node]] = None
        elif kind in _ELEMENTWISE | _SHAPING | _PARTING:
            parted = parted or kind in _PARTING
            stack += [parent for parent, _ in node.next_functions]
        else:
            return ()
    sizes = {calls[name].n_out for name in found}
    right = sizes == {record.n_in} or (parted and sizes == {2 * record.n_in})
    return tuple(name for name in calls if name in found) if right and record.count == 1 else ()


def _unit(model: nn.Module, path: str, feeders: tuple[str, ...], record: _Call, macs: dict[str, int]) -> Unit:
    layer = module_at(model, path)
    parts = [module_at(model, name) for name in feeders]
    weights = sum(matrix_of(part).numel() for part in (*parts, layer))
    biases = sum(len(part.bias) for part in parts if isinstance(part.bias, Tensor))
    return Unit(
        kind="neuron",
        path=path,
        module=type(layer).__name__,
        shape=record.shape,
        layout="channels_first" if isinstance(layer, nn.Conv2d) else "channels_last",
        activation="",
        n_params=weights + biases,
        macs=macs.get(path, 0) + sum(macs.get(name, 0) for name in feeders),
        members=record.n_in,
        feeders=feeders,
    )
