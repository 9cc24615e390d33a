"""Which modules feed a layer, read off the autograd graph of one pass: no tracing, no names, no list of families."""

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Tensor, nn

from ttmpd.models.modules import hooks
from ttmpd.models.run import call, evaluating
from ttmpd.surgery.layers import answers_plainly, is_convolution


@dataclasses.dataclass(slots=True)
class Call:
    """What was seen of a module: how often it ran, its shapes, and where its input and output stand in the graph."""

    count: int = 0
    given: Any = None
    made: Any = None
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    plain: bool = False
    """Whether it is a convolution over all channels and answered what its weights make of the input."""


def calls_of(model: nn.Module, batch: Tensor, watched: Callable[[nn.Module], bool]) -> dict[str, Call]:
    """Path -> call of every watched module that ran, in calling order; shapes without the batch."""
    seen: dict[str, Call] = {}

    def note(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        record, x = seen.setdefault(path, Call()), args[0]
        record.count += 1
        record.given, record.made = x.grad_fn, output.grad_fn
        record.inputs, record.outputs = tuple(x.shape[1:]), tuple(output.shape[1:])
        record.plain = is_convolution(module) and answers_plainly(module, x, output)

    modules = [(path, module) for path, module in model.named_modules() if watched(module)]
    handles = [m.register_forward_hook(lambda m, a, out, p=path: note(p, m, a, out)) for path, m in modules]
    with evaluating(model, gradients=True), hooks(handles):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        call(model, batch)
    return seen


def producers_of(
    path: str, calls: Mapping[str, Call], functions: Set[str], through: Callable[[str], bool] = lambda _: False
) -> tuple[tuple[str, ...], Set[str]]:
    """(the modules whose outputs alone make the input of the one at ``path``, the functions met on the way to them).

    The first is in calling order, and () when any other than the named autograd functions (``"Relu"`` for
    ``ReluBackward0``) stands between, or the module ran twice. ``through`` says of which modules the producers are
    looked for, too.
    """
    ends = {other.made: name for name, other in calls.items() if other.count == 1 and name != path}
    found, met, visited = set(), set(), set()
    stack = [calls[path].given] if calls[path].count == 1 else []
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue  # a constant, or seen
        visited.add(node)
        kind = str(node.name()).rpartition("::")[2].partition("Backward")[0]
        if node in ends:
            found.add(ends[node])
            stack += [calls[ends[node]].given] if through(ends[node]) else []
        elif kind in functions:
            met.add(kind)
            stack += [parent for parent, _ in node.next_functions]
        else:
            return (), met
    return tuple(name for name in calls if name in found), met
