"""Which modules feed a layer, read off the autograd graph of one pass: no tracing, no names, no list of families."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from torch import nn

from ttmpd.models.trace import ModuleCall
from ttmpd.surgery.observation import Observation, note_of


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What was seen of a module: how often it ran, its shapes, and where its input and output stand in the graph."""

    count: int
    input_node: Any
    output_node: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    plain: bool
    """Whether it is a convolution over all channels and answered what its weights make of the input."""


def calls_of(observation: Observation, watched: Callable[[nn.Module], bool]) -> dict[str, Call]:
    """Path -> call of every watched module that ran, in calling order; shapes without the batch."""
    paths = {path for path, module in observation.model.named_modules() if watched(module)}
    return {path: _call(calls) for path, calls in observation.trace.by_path().items() if path in paths}


def _call(calls: Sequence[ModuleCall]) -> Call:
    x, y = calls[-1].input, calls[-1].output
    assert x is not None and y is not None
    return Call(len(calls), x.node, y.node, x.shape[1:], y.shape[1:], note_of(calls[-1]).plain_convolution)


def producers_of(
    path: str, calls: Mapping[str, Call], functions: Set[str], through: Callable[[str], bool] = lambda _: False
) -> tuple[tuple[str, ...], Set[str]]:
    """(the modules whose outputs alone make the input of the one at ``path``, the functions met on the way to them).

    The first is in calling order, and () when any other than the named autograd functions (``"Relu"`` for
    ``ReluBackward0``) stands between, or the module ran twice. ``through`` says of which modules the producers are
    looked for, too.
    """
    ends = {other.output_node: name for name, other in calls.items() if other.count == 1 and name != path}
    producers, met, visited = set(), set(), set()
    stack = [calls[path].input_node] if calls[path].count == 1 else []
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue  # a constant, or seen
        visited.add(node)
        kind = str(node.name()).rpartition("::")[2].partition("Backward")[0]
        if node in ends:
            producers.add(ends[node])
            stack += [calls[ends[node]].input_node] if through(ends[node]) else []
        elif kind in functions:
            met.add(kind)
            stack += [parent for parent, _ in node.next_functions]
        else:
            return (), met
    return tuple(name for name in calls if name in producers), met
