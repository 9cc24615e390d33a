"""Run the parts of a model one by one, each on what the model gives it, for as many samples as fit into memory."""

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
_Seen = tuple[Tensor, int]
"""A tensor, and how often it had been written into."""
_SAME = (bool, str, type(None))
"""Types of arguments that are the same for every batch."""


@dataclass(eq=False)
class ModuleRunner:
    """The modules at ``paths``, in the order in which the model runs them, with what they are given.

    A module that is given the very output of the one before it, and nothing else but what that one was given, too (a
    mask, say), is not reached through the model again: the one before is run. So a model whose parts are changed in
    this order, each after its calls were asked for, is run about once.

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
        # Texts differ in length: a number that a module is given may be the length of these few.
        plain = (*_SAME, *(() if self.samples.is_text else (int, float)))
        self._before = _following(self.model, self.paths, self._few, plain)

    @property
    def most_values(self) -> int:
        """How many values per sample the module is given that is given most."""
        found = [tensor.numel() for path in set(self.paths) for tensor in tensors_in(self._reached(path, self._few))]
        return max(found) // len(self._few)

    def calls(self, path: str) -> list[Call]:
        """What the module at ``path`` is given, batch by batch."""
        if path != self._at:
            known = self._before.get(path)
            if known is not None and known.path == self._at:
                like = self._reached(path, self._few)
                self._calls = [
                    # Of another form if, say, no mask is needed for texts of one length.
                    _call(like, known.sources, self.run(known.path, call), call)
                    if _form(call) == known.form
                    else self._reached(path, batch)
                    for call, batch in zip(self._calls, self._batches(), strict=True)
                ]
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


@dataclass(frozen=True, eq=False)
class _Before:
    """What is run to know what a module is given.

    Args:
        path: of the module before it.
        form: of the call of that one.
        sources: where the tensors come from: numbers among those of that call, None for its answer.
    """

    path: str
    form: tuple[Any, ...]
    sources: tuple[int | None, ...]


def _form(call: Call) -> tuple[Any, ...]:
    """Where in a call there are tensors, and of which types all else is."""
    leaves, spec = tree_flatten(call)
    return (spec, *map(type, leaves))


def _call(like: Call, sources: Sequence[int | None], answer: Tensor, before: Call) -> Call:
    """A call of the same form whose tensors come from the one before."""
    given = tensors_in(before)
    tensors = iter([answer if number is None else given[number] for number in sources])
    args, kwargs = tree_map(lambda value: next(tensors) if isinstance(value, Tensor) else value, like)
    return args, kwargs


def _following(model: nn.Module, paths: Sequence[str], batch: Tensor, plain: tuple[type, ...]) -> dict[str, _Before]:
    """Path -> the module before it, where that one alone says what it is given.

    What else a module is given must be of a ``plain`` type: the same for every batch. A cache remembers its own.
    """
    calls: dict[str, tuple[Call, list[_Seen]]] = {}
    made: dict[str, _Seen] = {}

    def before(path: str, call: Call) -> None:
        calls[path] = call, [(tensor, tensor._version) for tensor in tensors_in(call)]

    def after(path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            made[path] = (output, output._version)

    handles = []
    for path in filter(None, paths):
        module = module_at(model, path)
        handles.append(module.register_forward_pre_hook(lambda _m, a, k, p=path: before(p, (a, k)), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _m, _a, out, p=path: after(p, out)))
    with hooks(handles):
        model(batch)
    found = {}
    for first, second in pairwise(paths):
        if first in made and second in calls:
            known = [*calls[first][1], made[first]]  # the answer last: a module may answer with what it was given
            call, given = calls[second]
            numbers = [_number(seen, known) for seen in given]
            alike = all(isinstance(leaf, (Tensor, *plain)) for leaf in tree_leaves(call))
            if alike and None not in numbers and numbers.count(len(known) - 1) == 1:
                sources = tuple(None if number == len(known) - 1 else number for number in numbers)
                found[second] = _Before(first, _form(calls[first][0]), sources)
    return found


def _number(seen: _Seen, known: Sequence[_Seen]) -> int | None:
    """The last of the known tensors that is this one, not written into since."""
    places = [number for number, other in enumerate(known) if other[0] is seen[0] and other[1] == seen[1]]
    return places[-1] if places else None
