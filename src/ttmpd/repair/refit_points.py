"""Which layers of a student are fitted again after a removal, and what each of them is fitted to.

A layer behind a removal is given other inputs than the teacher's. It is fitted to what the teacher answers there: to
the output of the layer, or of the batch norm that alone reads it; where that is added to a shortcut, to the sum, so
that the layer makes up for what the shortcut has lost.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttmpd.models.modules import clone, common_path, hooks, module_at
from ttmpd.models.run import first_tensor
from ttmpd.models.taps import find_output_layer
from ttmpd.models.trace import trace
from ttmpd.records import DepthUnit, Layout, Removal, WidthUnit
from ttmpd.surgery.cut import cut
from ttmpd.surgery.dataflow import ADDING, Layer, layers_of
from ttmpd.surgery.layers import is_convolution, is_layer, matrix_of, set_matrix
from ttmpd.surgery.replacements import replacement_at

MOST_INPUTS = 2304
"""Layers that read more values per output than this (256 channels under a 3x3 kernel) stay as they are: what a fit
costs grows with the third power."""
PER_HOST = 8
"""How many sites a module may hold that is run by itself to fit them: each of them is one more run of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class RefitPoint:
    """A layer of the student that can be fitted to the teacher.

    Args:
        layer: its path.
        path: of the module whose output is wanted, in the teacher and, but for stand-ins, in the student: the layer, or
            the batch norm behind it.
        shape: of the teacher's answer there for one sample; ``layout`` says which axis holds the channels.
        layout: see ``shape``.
        norm: path of the batch norm that alone reads the layer, "" when there is none.
        joined: whether the answer is added to another tensor: then the sum is wanted.
        activation: "relu" or "relu6" when that alone reads the answer, or the sum, else "".
        host: a module that holds everything of the site and is run by itself to fit it; "" for the whole model.
        kept: which of the teacher's outputs the layer still has, in order; () when it has all.
        members: how many members the layer reads where its unit was narrowed, else 0.
    """

    layer: str
    path: str
    shape: tuple[int, ...]
    layout: Layout
    norm: str = ""
    joined: bool = False
    activation: str = ""
    host: str = ""
    kept: tuple[int, ...] = ()
    members: int = 0

    @property
    def id(self) -> str:
        """Name of the site, unique within a model."""
        return self.layer

    @property
    def channels(self) -> int:
        """Width of the teacher's answer."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[-1]


def find_refit_points(
    teacher: nn.Module, student: nn.Module, removals: Sequence[Removal], batch: Tensor, *, behind: bool = True
) -> list[RefitPoint]:
    """What can be fitted, in the order in which the student runs it.

    Args:
        teacher: the model as found.
        student: the same with the removals made and stand-ins in their places.
        removals: in the order of the network.
        batch: a few samples.
        behind: all layers behind the first removal but the one that gives the logits; else the stand-ins and the layers
            that read the members of narrowed units alone.
    """
    stand_ins = {
        _stand_in_path(student, removal): removal.unit
        for removal in removals
        if removal.action == "linear" and isinstance(removal.unit, DepthUnit)
    }
    readers = {
        path: removal for removal in removals if isinstance(removal.unit, WidthUnit) for path in removal.unit.consumers
    }
    starts = {path for removal in removals for path in removal.unit.paths}
    calls = trace(student, batch).order
    first = next((i for i, path in enumerate(calls) if path in starts), len(calls))
    known, head = layers_of(teacher, batch), find_output_layer(student, batch)
    gone = {path for removal in removals if isinstance(removal.unit, DepthUnit) for path in removal.unit.paths}
    wanted = {
        path
        for path, layer in known.items()
        if layer.plain and path not in gone and (path in readers or (behind and path != head))
    }
    sites = []
    for path in calls[first:]:
        if path in stand_ins:
            unit = stand_ins[path]
            sites.append(RefitPoint(path, unit.path, unit.shape, unit.layout, activation=unit.activation))
        elif path in wanted and matrix_of(module_at(student, path)).shape[1] <= MOST_INPUTS:
            sites.append(_site(student, known[path], len(readers[path].kept) if path in readers else 0))
    sites = _with_kept(teacher, removals, sites)
    return [dataclasses.replace(site, host=host) for site, host in zip(sites, _hosts(sites, known, calls), strict=True)]


def _site(student: nn.Module, layer: Layer, members: int) -> RefitPoint:
    first = isinstance(module_at(student, layer.path), nn.Conv2d)
    return RefitPoint(
        layer.path, layer.norm or layer.path, layer.shape, "channels_first" if first else "channels_last", layer.norm,
        layer.joined, layer.activation, members=members,
    )  # fmt: skip


def _stand_in_path(student: nn.Module, removal: Removal) -> str:
    """Path of the layer in a stand-in, which may have a wrapper around it and an activation behind it."""
    own = replacement_at(student, removal.unit)
    layer = own[0] if isinstance(own, nn.Sequential) else own
    return next(str(path) for path, module in student.named_modules() if module is layer)


def _with_kept(teacher: nn.Module, removals: Sequence[Removal], sites: Sequence[RefitPoint]) -> list[RefitPoint]:
    """The sites with the outputs that their layers still have; those of which that cannot be told are left out.

    Each row of a copy's matrices is filled with its number, and the copy is cut like the student.
    """
    narrowed = {path for removal in removals if isinstance(removal.unit, WidthUnit) for path in removal.unit.producers}
    if not any(site.layer in narrowed for site in sites):
        return list(sites)
    numbered = clone(teacher)
    full = {}
    for path in narrowed:
        if is_layer(layer := module_at(numbered, path)) or is_convolution(layer):
            matrix = matrix_of(layer)
            full[path] = len(matrix)
            set_matrix(layer, torch.arange(len(matrix)).to(matrix)[:, None].expand_as(matrix), None)
    numbered = cut(numbered, removals)
    found = []
    for site in sites:
        if site.layer in full and site.layer in dict(numbered.named_modules()):
            matrix = matrix_of(module_at(numbered, site.layer))
            if not matrix.numel():
                continue
            rows = matrix[:, 0].long().tolist()
            site = dataclasses.replace(site, kept=tuple(rows) if len(rows) < full[site.layer] else ())
        found.append(site)
    return found


def _hosts(sites: Sequence[RefitPoint], known: Mapping[str, Layer], calls: Sequence[str]) -> Iterator[str]:
    """For each site the largest module around it that runs once and holds few sites; its sum is taken in it, too."""
    for site in sites:
        joins = known[site.layer].adder if site.joined else common_path(site.layer, site.path)
        around, names = [], joins.split(".")
        for n in range(len(names), 0, -1):
            path = ".".join(names[:n])
            if path and calls.count(path) == 1:
                around.append(path)
        small = [p for p in around if sum(_within(other.layer, p) for other in sites) <= PER_HOST]
        yield small[-1] if small else around[0] if around else ""


def _within(path: str, holder: str) -> bool:
    return path == holder or path.startswith(f"{holder}.")


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


@contextlib.contextmanager
def watch_points(
    model: nn.Module, sites: Sequence[RefitPoint], note: Callable[[RefitPoint, str, Tensor], None], inputs: bool = True
) -> Iterator[None]:
    """While active, every pass hands what is at the sites to ``note``, at once: it may be written into later.

    ``note(site, what, tensor)`` gets "input", what the layer reads; "own", the answer; and "sum", what came of adding
    it, for those that are joined. An exception in it ends the pass.

    Args:
        model: teacher or student.
        sites: in any order.
        note: what is called.
        inputs: whether inputs are wanted: the teacher does not have the layers of stand-ins.
    """
    at = {site.path: site for site in sites}
    sums = _Sums(lambda path, out: note(at[path], "sum", out))

    def answered(site: RefitPoint, answer: Any) -> None:
        output = first_tensor(answer)  # attention may answer with its weights, too
        assert output is not None
        note(site, "own", output)
        if site.joined:
            sums.watched[id(output)] = (site.path, output)

    handles = []
    for site in sites:
        last = module_at(model, site.path)
        handles.append(last.register_forward_hook(lambda _m, _a, out, s=site: answered(s, out)))
        if inputs:
            layer = module_at(model, site.layer)
            handles.append(layer.register_forward_pre_hook(lambda _m, args, s=site: note(s, "input", args[0])))
    with hooks(handles), sums:
        yield
