"""Which layers of a student are fitted after a removal, and to which outputs of the teacher.

A layer after a removal has other inputs than the teacher's. It is fitted to the teacher's output at the same place: to
that of the layer, or of the batch norm that alone reads it; where that is added to a shortcut, to the sum, so that the
layer makes up for what the shortcut has lost.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttmpd.models.modules import clone, common_path, hooks, module_at
from ttmpd.models.run import first_tensor
from ttmpd.models.taps import find_output_layer
from ttmpd.models.trace import trace
from ttmpd.records import DepthUnit, Layout, Removal, WidthUnit
from ttmpd.repair.limits import too_large_to_fit
from ttmpd.surgery.cut import cut
from ttmpd.surgery.dataflow import ADDING, Layer, layers_of
from ttmpd.surgery.layers import is_convolution, is_layer, matrix_of, set_matrix
from ttmpd.surgery.replacements import replacement_at

_log = logging.getLogger(__name__)

POINTS_PER_CONTAINER = 8
"""How many points the module may hold that is run by itself to fit them: each of them takes one more run of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class RefitPoint:
    """A layer of the student that can be fitted to the teacher.

    Args:
        layer: its path.
        path: of the module whose output is the target, in the teacher and, but for replacements, in the student: the
            layer, or the batch norm behind it.
        shape: of the teacher's output there for one sample; ``layout`` says which axis holds the channels.
        layout: see ``shape``.
        norm: path of the batch norm that alone reads the layer, "" when there is none.
        adds_to_residual: the output is added to another tensor: then the sum is the target.
        activation: "relu" or "relu6" when that alone reads the output, or the sum, else "".
        container: a module that holds all of these and is run by itself to fit the layer; "" for the whole model.
        kept_outputs: which of the teacher's outputs the layer still has, in order; () when it has all.
        n_members: how many members the layer reads where its unit was narrowed, else 0.
    """

    layer: str
    path: str
    shape: tuple[int, ...]
    layout: Layout
    norm: str = ""
    adds_to_residual: bool = False
    activation: str = ""
    container: str = ""
    kept_outputs: tuple[int, ...] = ()
    n_members: int = 0

    @property
    def id(self) -> str:
        """Name of the point, unique within a model."""
        return self.layer

    @property
    def channels(self) -> int:
        """Width of the teacher's output."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[-1]


def find_refit_points(
    teacher: nn.Module,
    student: nn.Module,
    removals: Sequence[Removal],
    batch: Tensor,
    *,
    later_layers: bool = True,
) -> list[RefitPoint]:
    """The layers that can be fitted, in the order in which the student runs them.

    Those whose fit is beyond this device are left out, and named in a warning.

    Args:
        teacher: the original model.
        student: a copy with the removals made and linear replacements in their places.
        removals: in the order of the network.
        batch: a few samples.
        later_layers: all layers from the first removal on but the output layer; otherwise only the linear replacements
            and the layers that read the members of narrowed units.
    """
    replaced = {
        _replacement_path(student, removal): removal.unit
        for removal in removals
        if removal.action == "linear" and isinstance(removal.unit, DepthUnit)
    }
    readers = {
        path: removal for removal in removals if isinstance(removal.unit, WidthUnit) for path in removal.unit.consumers
    }
    starts = {path for removal in removals for path in removal.unit.paths}
    order = trace(student, batch).order
    first = next((i for i, path in enumerate(order) if path in starts), len(order))
    layers, output_layer = layers_of(teacher, batch), find_output_layer(student, batch)
    removed = {path for removal in removals if isinstance(removal.unit, DepthUnit) for path in removal.unit.paths}
    shared = _shared_weights(teacher)
    fitted = {
        path
        for path, layer in layers.items()
        if layer.plain and path not in removed | shared and (path in readers or (later_layers and path != output_layer))
    }
    points = []
    for path in order[first:]:
        if path in replaced:
            unit = replaced[path]
            points.append(RefitPoint(path, unit.path, unit.shape, unit.layout, activation=unit.activation))
        elif path in fitted and (reason := too_large_to_fit(module_at(student, path))):
            _log.warning("%s is not fitted again: it %s", path, reason)
        elif path in fitted:
            points.append(_point(student, layers[path], len(readers[path].kept) if path in readers else 0))
    points = _with_kept_outputs(teacher, removals, points)
    containers = _containers(points, layers, order)
    return [dataclasses.replace(point, container=path) for point, path in zip(points, containers, strict=True)]


def _shared_weights(model: nn.Module) -> set[str]:
    """Paths of modules with a weight that another module has, too: what suits one place need not suit the other."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _point(student: nn.Module, layer: Layer, n_members: int) -> RefitPoint:
    is_convolution = isinstance(module_at(student, layer.path), nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return RefitPoint(
        layer.path,
        layer.norm or layer.path,
        layer.shape,
        "channels_first" if is_convolution else "channels_last",
        norm=layer.norm,
        adds_to_residual=layer.adds_to_residual,
        activation=layer.activation,
        n_members=n_members,
    )


def _replacement_path(student: nn.Module, removal: Removal) -> str:
    """Path of the layer in a linear replacement, which may have a wrapper around it and an activation behind it."""
    replacement = replacement_at(student, removal.unit)
    layer = replacement[0] if isinstance(replacement, nn.Sequential) else replacement
    return next(str(path) for path, module in student.named_modules() if module is layer)


def _with_kept_outputs(
    teacher: nn.Module, removals: Sequence[Removal], points: Sequence[RefitPoint]
) -> list[RefitPoint]:
    """The points with the outputs that their layers still have; layers without any output left are left out.

    Each row of a copy's matrices is filled with its number, and the copy is cut like the student.
    """
    narrowed = {path for removal in removals if isinstance(removal.unit, WidthUnit) for path in removal.unit.producers}
    if not any(point.layer in narrowed for point in points):
        return list(points)
    numbered, n_outputs = clone(teacher), {}
    for path in narrowed:
        if is_layer(layer := module_at(numbered, path)) or is_convolution(layer):
            matrix = matrix_of(layer)
            n_outputs[path] = len(matrix)
            set_matrix(layer, torch.arange(len(matrix)).to(matrix)[:, None].expand_as(matrix), None)
    modules = dict(cut(numbered, removals).named_modules())
    updated = []
    for point in points:
        if point.layer in n_outputs and point.layer in modules:
            matrix = matrix_of(modules[point.layer])
            if not matrix.numel():
                continue
            rows = matrix[:, 0].long().tolist()
            point = dataclasses.replace(point, kept_outputs=tuple(rows) if len(rows) < n_outputs[point.layer] else ())
        updated.append(point)
    return updated


def _containers(points: Sequence[RefitPoint], layers: Mapping[str, Layer], order: Sequence[str]) -> Iterator[str]:
    """For each point the largest module around it, and around its sum, that runs once and holds few points."""
    for point in points:
        inner = layers[point.layer].adder if point.adds_to_residual else common_path(point.layer, point.path)
        names = inner.split(".")
        around = [path for n in range(len(names), 0, -1) if (path := ".".join(names[:n])) and order.count(path) == 1]
        small = [p for p in around if sum(_within(other.layer, p) for other in points) <= POINTS_PER_CONTAINER]
        yield small[-1] if small else around[0] if around else ""


def _within(path: str, container: str) -> bool:
    return path == container or path.startswith(f"{container}.")


class _Sums(TorchFunctionMode):
    """Hands the first sum that each watched tensor enters to ``note``."""

    def __init__(self, note: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.note, self.watched = note, dict[int, tuple[str, Tensor]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.watched and getattr(func, "__name__", "") in ADDING:
            for tensor in args[:2]:
                path, _ = self.watched.pop(id(tensor), ("", None))
                if path:
                    self.note(path, out)
        return out


Role = Literal["input", "output", "sum"]
"""A tensor at a point: what the layer reads, what it (or the batch norm behind it) returns, or the sum with the
shortcut, for points that add to a residual."""


@contextlib.contextmanager
def watch_points(
    model: nn.Module,
    points: Sequence[RefitPoint],
    note: Callable[[RefitPoint, Role, Tensor], None],
    inputs: bool = True,
) -> Iterator[None]:
    """While active, every forward pass calls ``note(point, role, tensor)`` for the tensors at the points.

    The call comes at once, since the tensors may be written into later. An exception in it ends the pass.

    Args:
        model: teacher or student.
        points: in any order.
        note: see above.
        inputs: note inputs, too; the teacher does not have the layers of linear replacements.
    """
    by_path = {point.path: point for point in points}
    sums = _Sums(lambda path, out: note(by_path[path], "sum", out))

    def note_output(point: RefitPoint, value: Any) -> None:
        output = first_tensor(value)  # attention may return its weights, too
        assert output is not None
        note(point, "output", output)
        if point.adds_to_residual:
            sums.watched[id(output)] = (point.path, output)

    handles = []
    for point in points:
        last = module_at(model, point.path)
        handles.append(last.register_forward_hook(lambda _m, _a, out, p=point: note_output(p, out)))
        if inputs:
            layer = module_at(model, point.layer)
            handles.append(layer.register_forward_pre_hook(lambda _m, args, p=point: note(p, "input", args[0])))
    with hooks(handles), sums:
        yield
