"""Whole residual blocks, found in any network without tracing.

A unit is a module that has weights, is called once, answers with the shape it was given, and has a shortcut around it
(or stands in a row of equal modules of several layers). Shortcuts are read off the autograd graph: a path from output
to input that crosses an addition and no weights. A path that crosses products only is a gate (squeeze and excitation),
which is no unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttmpd.errors import first_line
from ttmpd.models.modules import count_parameters, module_at, replace_module
from ttmpd.models.run import evaluating, predict
from ttmpd.models.tiny import tiny_model
from ttmpd.models.trace import ModuleCall
from ttmpd.records import Action, DepthUnit, Form, Layout
from ttmpd.surgery.observation import Observation
from ttmpd.surgery.reasons import Reason, Refusal
from ttmpd.surgery.replacements import drop
from ttmpd.surgery.units.base import DepthUnits, UnitSearch

# Backward nodes that keep every value apart from shifts, clipping and normalisation: a shortcut may cross them.
_TRANSPARENT = {
    "Add", "Relu", "Hardtanh", "LeakyRelu", "Gelu", "Silu", "Hardswish", "Elu", "Threshold", "View", "UnsafeView",
    "ReshapeAlias", "Permute", "Transpose", "T", "Clone", "ToCopy", "Alias", "Slice", "Squeeze", "Unsqueeze", "Roll",
    "NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm", "NativeDropout", "Contiguous",
}  # fmt: skip


_CONVOLUTIONS: dict[int, Callable[[int, int, int], nn.Module]] = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
"""Axes of a map, the channels included -> the convolution over the others."""


@dataclass(frozen=True, slots=True, eq=False)
class _ModuleRun:
    """One module in a forward pass: its last call, how often it was called, and what leads around it."""

    call: ModuleCall
    count: int
    shortcut: bool
    gate: bool

    @property
    def input(self) -> Tensor | None:
        """The first argument, where that is a tensor."""
        return None if self.call.input is None else self.call.input.value

    @property
    def output(self) -> Tensor | None:
        """The first tensor that it answered with."""
        return None if self.call.output is None else self.call.output.value


class Block(DepthUnits):
    """Blocks whose output has the shape of their input.

    Example:
        >>> from torchvision.models import resnet18
        >>> [unit.path for unit in Block().find(resnet18().eval(), torch.zeros(1, 3, 64, 64)).units]
        ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1', 'layer4.1']
    """

    source: ClassVar[str] = "PRACTISE (arXiv 2202.07861), section 3: blocks of equal shape; found here by running"
    actions: ClassVar[tuple[Action, ...]] = ("drop", "linear")

    def search(self, observation: Observation) -> UnitSearch:
        """The removable blocks, in the order of the network."""
        model, runs = observation.model, _watch(observation)
        refused: dict[str, Refusal] = {}
        repeated = _in_rows(model, runs)
        chosen = _choose(model, "", runs, repeated, refused)
        order = {path: number for number, path in enumerate(runs)}
        units = [
            _unit(path, module_at(model, path), runs[path], observation.macs)
            for path in sorted(chosen, key=order.__getitem__)
        ]
        removable = [unit for unit in units if _works_without(model, unit, observation.batch, refused)]
        return UnitSearch(tuple(removable), refused)

    def example(self, n: int = 4) -> tuple[nn.Module, Tensor]:
        """Three residual blocks between a stem and a head, and images for them."""
        return tiny_model(), torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def replacement(self, unit: DepthUnit) -> nn.Module:
        """A 1x1 convolution or a square matrix, followed by the block's own activation."""
        linear: nn.Module
        with torch.random.fork_rng():
            if unit.layout == "channels_first":
                linear = _CONVOLUTIONS[len(unit.shape)](unit.channels, unit.channels, 1)
            else:
                linear = nn.Linear(unit.channels, unit.channels)
        if not unit.activation:
            return linear
        return nn.Sequential(linear, {"relu": nn.ReLU, "relu6": nn.ReLU6}[unit.activation]())


def _watch(observation: Observation) -> dict[str, _ModuleRun]:
    """Every module that holds layers, as one run with gradients shows it, in calling order."""
    modules = observation.model.named_modules()
    holders = {path for path, module in modules if path and list(module.children()) and _n_layers(module)}
    return {path: _module_run(calls) for path, calls in observation.trace.by_path().items() if path in holders}


def _module_run(calls: Sequence[ModuleCall]) -> _ModuleRun:
    last = calls[-1]
    ends = (None if last.output is None else last.output.node, None if last.input is None else last.input.node)
    shortcut = _has_shortcut(*ends, _is_sum)
    return _ModuleRun(last, len(calls), shortcut, not shortcut and _has_shortcut(*ends, _is_product))


def _node_name(node: Any) -> str:
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def _is_sum(node: Any) -> bool:
    return _node_name(node) == "Add" and len([parent for parent, _ in node.next_functions if parent]) > 1


def _is_scale(node: Any) -> bool:
    """A product with a parameter or a constant: it keeps what is scaled apart."""
    if _node_name(node) != "Mul":
        return False
    return any(parent is None or _from_parameter(parent) for parent, _ in node.next_functions)


def _from_parameter(node: Any) -> bool:
    while _node_name(node) in _TRANSPARENT and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return str(node.name()).endswith("AccumulateGrad")


def _is_product(node: Any) -> bool:
    return _node_name(node) == "Mul" and not _is_scale(node)


def _has_shortcut(start: Any, goal: Any, joins: Callable[[Any], bool]) -> bool:
    """Whether the autograd graph leads from node to node past no weights, through one that ``joins``."""
    if start is None or goal is None:
        return False
    stack, visited = [(start, False)], set()
    while stack:
        node, joined = stack.pop()
        if (node, joined) in visited:
            continue
        visited.add((node, joined))
        if node is goal:
            if joined:
                return True
            continue
        if joins(node) or _is_scale(node) or _node_name(node) in _TRANSPARENT:
            joined = joined or joins(node)
            stack += [(parent, joined) for parent, _ in node.next_functions[:2] if parent is not None]
    return False


def _same_shape(record: _ModuleRun) -> bool:
    x, y = record.input, record.output
    return x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype


def _in_rows(model: nn.Module, runs: dict[str, _ModuleRun]) -> set[str]:
    """Paths of modules of several layers that keep the shape and have a sibling of the same class that does too."""
    rows: dict[tuple[str, type], list[str]] = {}
    for path, record in runs.items():
        module = module_at(model, path)
        if record.count == 1 and _same_shape(record) and type(module) is not nn.Sequential and _n_layers(module) > 1:
            rows.setdefault((path.rpartition(".")[0], type(module)), []).append(path)
    return {path for paths in rows.values() if len(paths) > 1 for path in paths}


def _choose(
    model: nn.Module, path: str, runs: dict[str, _ModuleRun], repeated: set[str], refused: dict[str, Refusal]
) -> list[str]:
    """The units below ``path``: a module itself, or its parts when they make up nearly all of it (a stage)."""
    module, record = module_at(model, path), runs.get(path)
    refused_below: dict[str, Refusal] = {}
    below: list[str] = []
    for name, _ in module.named_children():
        below += _choose(model, f"{path}.{name}" if path else name, runs, repeated, refused_below)
    weights = count_parameters(module)
    if record is None or weights == 0 or not path:
        refused.update(refused_below)
        return below
    covered = sum(count_parameters(module_at(model, part)) for part in below)
    reason = _refusal(record, path in repeated)
    if reason and not below and _worth_telling(module, record):
        refused[path] = reason
    # Parts without a shortcut of their own are no reason to pass by the shortcut around the whole.
    parts_are_units = not record.shortcut or all(runs[part].shortcut for part in below)
    if reason or (covered >= 0.9 * weights and parts_are_units):
        refused.update(refused_below)
        return below
    return [path]


def _refusal(record: _ModuleRun, in_row: bool) -> Refusal | None:
    """Why a module is no unit; None when it is one."""
    x, y = record.call.input, record.call.output
    if x is None or y is None:
        return Refusal(Reason.NO_TENSOR)
    if record.count > 1:
        return Refusal(Reason.CALLED_AGAIN, f"{record.count} times")
    if not _same_shape(record):
        return Refusal(Reason.OTHER_SHAPE, f"{x.shape[1:]} to {y.shape[1:]}")
    if record.gate:
        return Refusal(Reason.GATE)
    if not record.shortcut and not in_row:
        return Refusal(Reason.NO_SHORTCUT)
    if x.n_writes:
        return Refusal(Reason.WRITES_INPUT)
    if y.value is not None and y.value._version != y.version:
        return Refusal(Reason.OUTPUT_WRITTEN)
    return None


def _worth_telling(module: nn.Module, record: _ModuleRun) -> bool:
    """Whether a user would expect to see this module in the list of refusals: block-like, not a layer's wrapper."""
    n_leaves = sum(1 for m in module.modules() if not list(m.children()) and count_parameters(m))
    is_map = record.call.input is None or len(record.call.input.shape) >= 3
    return is_map and n_leaves >= 3 and type(module) is not nn.Sequential


def _n_layers(module: nn.Module) -> int:
    """Layers that mix channels or positions: kernels and matrices, not norms."""
    return sum(1 for parameter in module.parameters() if parameter.dim() >= 2)


def _unit(path: str, module: nn.Module, record: _ModuleRun, macs: dict[str, int]) -> DepthUnit:
    assert record.output is not None
    answer = record.output.detach()
    return DepthUnit(
        kind="block",
        path=path,
        module=type(module).__name__,
        shape=tuple(answer.shape[1:]),
        layout=_layout(module, answer),
        activation=_activation(answer),
        n_params=count_parameters(module),
        macs=macs.get(path, 0),
        form=_form(record.call),
    )


def _form(call: ModuleCall) -> Form:
    """In what a module answers: a tuple of one, or of a tensor and None where that is what it gave."""
    if call.output_type is not tuple:
        return "plain" if call.is_plain else "arguments"
    others = call.result[1:] if isinstance(call.result, tuple) else ()
    return "pair" if len(others) == 1 and others[0] is None else "tuple"


def _layout(module: nn.Module, answer: Tensor) -> Layout:
    """Read off the layers which axis holds the channels: convolutions say axis 1, matrices the last axis."""
    if answer.dim() == 2:
        return "channels_last"
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.in_channels == answer.shape[1]:
            return "channels_first"
        if isinstance(layer, nn.Linear | nn.LayerNorm) and layer.weight.shape[-1] == answer.shape[-1]:
            return "channels_last"
    return "channels_first" if answer.dim() in (4, 5) else "channels_last"


def _activation(answer: Tensor) -> str:
    """Which clipping the block ends with, seen in its values."""
    if float(answer.min()) != 0.0 or int((answer == 0).sum()) < answer.numel() // 50:
        return ""
    return "relu6" if float(answer.max()) == 6.0 else "relu"


def _works_without(model: nn.Module, unit: DepthUnit, batch: Tensor, refused: dict[str, Refusal]) -> bool:
    """Whether the rest of the model runs when the unit is really gone (some models read a block's attributes)."""
    original = module_at(model, unit.path)
    drop(model, unit)
    try:
        with evaluating(model):
            predict(model, batch[:1])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        refused[unit.path] = Refusal(Reason.NEEDED, first_line(error)[:120])
        return False
    finally:
        replace_module(model, unit.path, original)
    return True
