"""Run modules of a model one by one, each on what the model gives it, for as many samples as fit in memory."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ttmpd.data.samples import Samples
from ttmpd.models.modules import hooks, module_at
from ttmpd.models.run import StopForwardError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""
_CONSTANT_TYPES = (bool, str, type(None))
"""Types of arguments that are the same for every batch."""


@dataclass(eq=False)
class ModuleRunner:
    """The modules at ``paths``, in the order in which the model runs them, with the arguments that it passes to them.

    If a module's arguments are the output of the module before it and what that one was called with (a mask, say), they
    are computed by running that module instead of the model up to there. So a model whose modules are changed in this
    order, each after its calls were asked for, is run about once.

    Args:
        model: in eval mode; "" among the paths is the model itself.
        paths: of modules that run once.
        samples: inputs of the model.
        batch_size: samples per call.
        device: of the model.
    """

    model: nn.Module
    paths: Sequence[str]
    samples: Samples
    batch_size: int
    device: torch.device
    _path: str | None = None
    _calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pair = self.samples.batch(slice(0, 2), self.device)
        # Texts differ in length: a number among the arguments may be the length of these two.
        constants = (*_CONSTANT_TYPES, *(() if self.samples.is_text else (int, float)))
        self._predecessors = _predecessors(self.model, self.paths, self._pair, constants)

    @property
    def max_input_values(self) -> int:
        """The most values per sample that any of the modules is called with."""
        sizes = [tensor.numel() for path in set(self.paths) for tensor in tensors_in(self._call_at(path, self._pair))]
        return max(sizes) // len(self._pair)

    def calls(self, path: str) -> list[Call]:
        """The arguments of the module at ``path``, batch by batch."""
        if path != self._path:
            predecessor = self._predecessors.get(path)
            if predecessor is not None and predecessor.path == self._path:
                self._calls = self._next_calls(path, predecessor)
            else:
                self._calls = []  # free the memory first
                self._calls = [self._call_at(path, batch) for batch in self._batches()]
            self._path = path
        return self._calls

    def run(self, path: str, call: Call) -> Any:
        """The module's output for a call, on copies of its tensors: the module may write into them."""
        args, kwargs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, call)
        return (module_at(self.model, path) if path else self.model)(*args, **kwargs)

    def _next_calls(self, path: str, predecessor: "_Predecessor") -> list[Call]:
        template = self._call_at(path, self._pair)
        return [
            # Of another form if, say, no mask is needed for texts of one length.
            _filled(template, predecessor.sources, self.run(predecessor.path, call), call)
            if _form(call) == predecessor.form
            else self._call_at(path, batch)
            for call, batch in zip(self._calls, self._batches(), strict=True)
        ]

    def _batches(self) -> Iterator[Tensor]:
        return self.samples.batches(self.batch_size, self.device)

    def _call_at(self, path: str, batch: Tensor) -> Call:
        """The arguments of the module at ``path`` for a batch, from a run of the model up to there."""
        if not path:
            return (batch,), {}
        calls: list[Call] = []

        def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((args, kwargs))
            raise StopForwardError

        handle = module_at(self.model, path).register_forward_pre_hook(stop, with_kwargs=True)
        with hooks([handle]), contextlib.suppress(StopForwardError):
            self.model(batch)
        return calls[0]


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, slots=True, eq=False)
class _Version:
    """A tensor, and how often it had been written into when it was noted."""

    tensor: Tensor
    number: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Version":
        return cls(tensor, tensor._version)


@dataclass(frozen=True, eq=False)
class _Predecessor:
    """The module whose call and output determine the arguments of the next one.

    Args:
        path: of the module.
        form: of its call, see :func:`_form`.
        sources: for each tensor among the next module's arguments its number among those of the call, None for the
            output.
    """

    path: str
    form: tuple[Any, ...]
    sources: tuple[int | None, ...]


def _form(call: Call) -> tuple[Any, ...]:
    """The structure of a call, and the type of each of its values."""
    leaves, structure = tree_flatten(call)
    return (structure, *map(type, leaves))


def _filled(template: Call, sources: Sequence[int | None], output: Tensor, call: Call) -> Call:
    """A call like ``template`` whose tensors come from the predecessor's call and output."""
    arguments = tensors_in(call)
    tensors = iter([output if number is None else arguments[number] for number in sources])
    args, kwargs = tree_map(lambda value: next(tensors) if isinstance(value, Tensor) else value, template)
    return args, kwargs


def _predecessors(
    model: nn.Module, paths: Sequence[str], batch: Tensor, constants: tuple[type, ...]
) -> dict[str, _Predecessor]:
    """Path -> the module before it, where that one alone determines the arguments.

    Other arguments must be of a type in ``constants``, the same for every batch; a cache, say, is not.
    """
    calls: dict[str, tuple[Call, list[_Version]]] = {}
    outputs: dict[str, _Version] = {}

    def before(path: str, call: Call) -> None:
        calls[path] = call, [_Version.of(tensor) for tensor in tensors_in(call)]

    def after(path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[path] = _Version.of(output)

    handles = []
    for path in filter(None, paths):
        module = module_at(model, path)
        handles.append(module.register_forward_pre_hook(lambda _m, a, k, p=path: before(p, (a, k)), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _m, _a, out, p=path: after(p, out)))
    with hooks(handles):
        model(batch)
    predecessors = {}
    for first, second in pairwise(paths):
        if first in outputs and second in calls:
            call, arguments = calls[second]
            sources = _sources(arguments, calls[first][1], outputs[first])
            if sources is not None and all(isinstance(leaf, (Tensor, *constants)) for leaf in tree_leaves(call)):
                predecessors[second] = _Predecessor(first, _form(calls[first][0]), sources)
    return predecessors


def _sources(
    arguments: Sequence[_Version], inputs: Sequence[_Version], output: _Version
) -> tuple[int | None, ...] | None:
    """Where each argument comes from: a number among ``inputs``, or None for ``output``, which must occur once.

    None for all of them together if one is neither, or was written into since.
    """
    candidates = [*inputs, output]  # the output last: a module may return what it was called with
    numbers = []
    for argument in arguments:
        same = [i for i, c in enumerate(candidates) if c.tensor is argument.tensor and c.number == argument.number]
        if not same:
            return None
        numbers.append(same[-1])
    if numbers.count(len(inputs)) != 1:
        return None
    return tuple(None if number == len(inputs) else number for number in numbers)
