"""Branches of residual sums, ``f`` of ``x + f(x)``, read off the autograd graph, with the modules that make them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ttmpd.models.modules import count_parameters, module_at
from ttmpd.models.run import output_tensors
from ttmpd.models.trace import ModuleCall, Trace
from ttmpd.records import DepthUnit, Form, Layout
from ttmpd.surgery.layers import is_layer, matrix_of, n_axes
from ttmpd.surgery.masks import proven
from ttmpd.surgery.observation import Observation, note_of
from ttmpd.surgery.reasons import Refusal
from ttmpd.surgery.replacements import drop

_SHAPING = {"View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "Clone", "ToCopy", "Alias", "NativeDropout"}
"""Functions that keep every value: the shortcut may cross them."""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """What is added to a shortcut.

    Args:
        calls: of the largest modules that work for the branch alone, in calling order; the last has parameters.
        is_attention: whether positions attend to each other in it.
        layers: the modules that own its matrices and kernels.
    """

    calls: tuple[ModuleCall, ...]
    is_attention: bool
    layers: tuple[nn.Module, ...]

    @property
    def is_mlp(self) -> bool:
        """Whether it is made of two matrices or more, each applied at every position."""
        return not self.is_attention and len(self.layers) > 1 and all(map(is_layer, self.layers))


def find_branches(observation: Observation) -> list[Branch]:
    """The branches beside a shortcut around them, in the order of the network.

    A branch is computed from the shortcut's own tensor and from parameters alone, and nothing else reads it.
    """
    model, run = observation.model, observation.trace
    users = _users([tensor.grad_fn for tensor in output_tensors(run.output) if tensor.grad_fn is not None])
    branches: list[Branch] = []
    for node in users:
        parents = [parent for parent, _ in node.next_functions]
        if _name(node) == "Add" and len(parents) == 2 and None not in parents:
            for shortcut, branch in (parents, parents[::-1]):
                if nodes := _between(branch, shortcut):
                    branches += _branch(model, run, _alone(nodes, node, users), users)
    order = {path: number for number, path in enumerate(run.order)}
    return sorted(branches, key=lambda branch: order[branch.calls[-1].path])


def branch_units(
    observation: Observation, kind: str, branches: Sequence[Branch]
) -> tuple[list[DepthUnit], dict[str, Refusal]]:
    """(units of the branches that can be dropped exactly, path -> why the others cannot)."""
    model = observation.model
    units = [_unit(model, kind, branch, observation.macs) for branch in branches]
    return proven(lambda student, unit, _: drop(student, unit), model, units, observation.batch[:2])


def _name(node: Any) -> str:
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def _users(roots: Sequence[Any]) -> dict[Any, list[Any]]:
    """Node -> the nodes that read it, of all from which the roots are computed."""
    users: dict[Any, list[Any]] = {root: [] for root in roots}
    stack = list(users)
    while stack:
        node = stack.pop()
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            if parent not in users:
                users[parent] = []
                stack.append(parent)
            users[parent].append(node)
    return users


def _between(branch: Any, shortcut: Any) -> set[Any]:
    """The nodes from the branch's end to the shortcut's tensor; empty where it is computed from anything else, too."""
    source = shortcut
    while True:
        nodes, meets = _closure(branch, source)
        if meets:
            earlier, _ = _closure(source, None)
            return set() if any(not _is_leaf(node) and node in earlier for node in nodes) else nodes
        if _name(source) not in _SHAPING or source.next_functions[0][0] is None:
            return set()
        source = source.next_functions[0][0]


def _closure(start: Any, end: Any) -> tuple[set[Any], bool]:
    """(all nodes from which ``start`` is computed, as far as ``end``; whether that is one of them)."""
    visited, stack, meets = set(), [start], False
    while stack:
        node = stack.pop()
        if node is end:
            meets = True
        elif node not in visited:
            visited.add(node)
            stack += [parent for parent, _ in node.next_functions if parent is not None]
    return visited, meets


def _is_leaf(node: Any) -> bool:
    return _name(node).startswith("torch") or str(node.name()).endswith("AccumulateGrad")


def _alone(nodes: set[Any], add: Any, users: Mapping[Any, Sequence[Any]]) -> set[Any]:
    """Those of the nodes that nothing but the branch reads."""
    alone = set(nodes)
    while shared := {node for node in alone if any(user is not add and user not in alone for user in users[node])}:
        alone -= shared
    return alone


def _branch(model: nn.Module, run: Trace, nodes: set[Any], users: Mapping[Any, Sequence[Any]]) -> Iterator[Branch]:
    weights = {id(node.variable) for node in nodes if str(node.name()).endswith("AccumulateGrad")}
    inside: dict[str, ModuleCall] = {}
    for path, call in run.once().items():
        module = module_at(model, path)
        within = any(path.startswith(f"{other}.") for other in inside)
        if not path or within or call.output is None or call.output.node not in nodes or note_of(call).form is None:
            continue
        if all(id(parameter) in weights for parameter in module.parameters()):
            inside[path] = call
    heavy = [number for number, path in enumerate(inside) if count_parameters(module_at(model, path))]
    if not heavy:
        return
    calls = tuple(inside.values())[: heavy[-1] + 1]
    layers = tuple(
        module
        for module in model.modules()
        if any(id(p) in weights and p.dim() > 1 for p in module.parameters(recurse=False))
    )
    yield Branch(calls, _attends({_name(node) for node in nodes}), layers)


def _attends(functions: set[str]) -> bool:
    """Whether positions attend to each other in what is made of the named autograd functions."""
    weights = any(name in ("Softmax", "SafeSoftmax") for name in functions)
    return (weights and "Bmm" in functions) or any(name.startswith("ScaledDotProduct") for name in functions)


def _unit(model: nn.Module, kind: str, branch: Branch, macs: Mapping[str, int]) -> DepthUnit:
    paths = [call.path for call in branch.calls]
    last = branch.calls[-1]
    assert last.output is not None
    module, shape = module_at(model, last.path), last.output.shape[1:]
    return DepthUnit(
        kind=kind,
        path=last.path,
        module=type(module).__name__,
        shape=shape,
        layout=_layout(branch, shape),
        n_params=sum(count_parameters(module_at(model, path)) for path in paths),
        macs=sum(macs.get(path, 0) for path in paths),
        form=_called(last),
        branch=True,
        upstream=tuple((call.path, _called(call)) for call in branch.calls[:-1]),
    )


def _called(call: ModuleCall) -> Form:
    form = note_of(call).form
    assert form is not None
    return "arguments" if form == "plain" and not call.is_plain else form


def _layout(branch: Branch, shape: tuple[int, ...]) -> Layout:
    axes = len(shape) - 1
    convolution = any(axes and n_axes(layer) == axes and len(matrix_of(layer)) == shape[0] for layer in branch.layers)
    return "channels_first" if convolution else "channels_last"
