"""Run the parts of a model one by one, each on what the model gives it, for as many samples as fit into memory."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ttmpd.modules import StopForwardError, hooks, module_at
from ttmpd.records import Samples

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""


@dataclass(eq=False)
class Parts:
    """The modules at ``paths``, in the order in which the model runs them, with what they are given.

    A module that is given the very output of the one before it is not reached through the model again: the one before
    is run. So a model whose parts are changed in this order, each after its calls were asked for, is run about once.

    Args:
        model: in eval mode; "" among the paths is the model itself.
        paths: of modules that run once.
        samples: what the model is run on.
        batch_size: samples per call.
        device: of the model.
    """

    model: nn.Module
    paths: Sequence[str]
    samples: Samples
    batch_size: int
    device: torch.device
    _at: str | None = None
    _calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._few = self.samples.batch(slice(0, 2), self.device)
        self._before = _following(self.model, self.paths, self._few)

    @property
    def most_values(self) -> int:
        """How many values per sample the module is given that is given most."""
        found = [tensor.numel() for path in set(self.paths) for tensor in tensors_in(self._reached(path, self._few))]
        return max(found) // len(self._few)

    def calls(self, path: str) -> list[Call]:
        """What the module at ``path`` is given, batch by batch."""
        if path != self._at:
            before = self._before.get(path)
            if before is not None and before == self._at:
                like = self._reached(path, self._few)
                self._calls = [_with_tensor(like, self.run(before, call)) for call in self._calls]
            else:
                self._calls = []  # free the memory first
                self._calls = [self._reached(path, batch) for batch in self._batches()]
            self._at = path
        return self._calls

    def run(self, path: str, call: Call) -> Any:
        """The module's answer to a call, of whose tensors it gets copies: it may write into them."""
        args, kwargs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, call)
        return (module_at(self.model, path) if path else self.model)(*args, **kwargs)

    def _batches(self) -> Iterator[Tensor]:
        return self.samples.batches(self.batch_size, self.device)

    def _reached(self, path: str, batch: Tensor) -> Call:
        if not path:
            return (batch,), {}
        seen: list[Call] = []

        def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append((args, kwargs))
            raise StopForwardError

        handle = module_at(self.model, path).register_forward_pre_hook(stop, with_kwargs=True)
        with hooks([handle]), contextlib.suppress(StopForwardError):
            self.model(batch)
        return seen[0]


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _with_tensor(call: Call, tensor: Tensor) -> Call:
    """The same call with another tensor, where there is one alone."""
    args, kwargs = tree_map(lambda value: tensor if isinstance(value, Tensor) else value, call)
    return args, kwargs


def _following(model: nn.Module, paths: Sequence[str], batch: Tensor) -> dict[str, str]:
    """Path -> path of the module before it, where that one's very output is the only tensor that it is given."""
    given: dict[str, tuple[Tensor, int]] = {}
    made: dict[str, tuple[Tensor, int]] = {}

    def before(path: str, args: Any, kwargs: Any) -> None:
        tensors = tensors_in((args, kwargs))
        if len(tensors) == 1:
            given[path] = (tensors[0], tensors[0]._version)

    def after(path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            made[path] = (output, output._version)

    handles = []
    for path in filter(None, paths):
        module = module_at(model, path)
        handles.append(module.register_forward_pre_hook(lambda _m, a, k, p=path: before(p, a, k), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _m, _a, out, p=path: after(p, out)))
    with hooks(handles):
        model(batch)
    found = {}
    for first, second in pairwise(paths):
        (x, x_version), (y, y_version) = given.get(second, (None, 0)), made.get(first, (None, 0))
        if x is not None and x is y and x_version == y_version:
            found[second] = first
    return found
