"""One forward pass, noted: which modules ran in which order, with which arguments, and what came out."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ttmpd.models.modules import hooks
from ttmpd.models.run import evaluating, first_tensor

Note = Callable[[nn.Module, Any, Any], object]
"""``note(module, args, output)`` looks at a call while its tensors are as they were."""


@dataclass(frozen=True, slots=True, eq=False)
class TracedTensor:
    """What is noted of a tensor.

    Args:
        shape: with the batch.
        n_bytes: of its values.
        node: where it stands in the autograd graph when the call ends; None without gradients.
        version: of its values when the call ends: how often it was written into.
        n_writes: how often the call wrote into it.
        value: the tensor itself, None unless values were asked for.
    """

    shape: tuple[int, ...]
    n_bytes: int
    node: Any = None
    version: int = 0
    n_writes: int = 0
    value: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ModuleCall:
    """One call of a module.

    Args:
        names: every path that the model has for the module; the first is the one of ``named_modules``.
        n_arguments: positional and by keyword.
        is_plain: whether it was called with one positional argument alone.
        input: the first argument, None where that is no tensor.
        output: the first tensor of a tensor or a tuple, else None.
        output_type: class of what was returned.
        args: the positional arguments, () unless values were asked for.
        kwargs: the others, by name.
        result: what was returned, None unless values were asked for.
        note: what the caller's own function said of it.
    """

    names: tuple[str, ...]
    n_arguments: int
    is_plain: bool
    input: TracedTensor | None
    output: TracedTensor | None
    output_type: type
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    note: object = None

    @property
    def path(self) -> str:
        """The module's first name."""
        return self.names[0]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """All calls of one forward pass, in the order in which they began.

    Args:
        calls: of the model itself first.
        output: what the model returned.
    """

    calls: tuple[ModuleCall, ...]
    output: Any

    @property
    def order(self) -> tuple[str, ...]:
        """Paths of the modules in calling order, once per call; a shared module under all of its names."""
        return tuple(name for call in self.calls for name in call.names)

    def by_path(self) -> dict[str, list[ModuleCall]]:
        """Path -> the calls of the module there, in the order of its first call; by first names."""
        calls: dict[str, list[ModuleCall]] = {}
        for call in self.calls:
            calls.setdefault(call.path, []).append(call)
        return calls

    def once(self) -> dict[str, ModuleCall]:
        """Path -> call of the modules that were called once."""
        return {path: calls[0] for path, calls in self.by_path().items() if len(calls) == 1}


def trace(
    model: nn.Module,
    batch: Tensor,
    *,
    paths: Collection[str] | None = None,
    values: bool = False,
    gradients: bool = False,
    note: Note | None = None,
) -> Trace:
    """Run the model once, in eval mode, and note every call of its modules.

    Args:
        model: left untouched.
        batch: a few samples on its device.
        paths: modules to note, under any of their names; all of them when not given.
        values: keep arguments and outputs, which takes memory; the tensors are the model's own, not copies.
        gradients: note where tensors stand in the autograd graph, and keep that; the batch has a node there, too.
        note: see :data:`Note`.

    Cost: one forward pass.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> [(call.path, call.output.shape) for call in trace(net, torch.zeros(2, 4)).calls]
        [('', (2, 8)), ('0', (2, 8)), ('1', (2, 8))]
    """
    recorder = _Recorder(values, note)
    handles = []
    for module, names in _names(model).items():
        if paths is None or any(name in paths for name in names):
            handles += recorder.watch(module, names)
    with evaluating(model, gradients), hooks(handles):
        if gradients:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            batch = batch.clone().requires_grad_(batch.is_floating_point())
            batch = batch.view_as(batch)  # a view has a node in the graph
        output = model(batch)
    return Trace(tuple(call for call in recorder.calls if call is not None), output)


def _names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    names: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), path)
    return names


class _Recorder:
    """Notes calls as they begin and end; what began and never ended (an exception that was caught) leaves no call."""

    def __init__(self, values: bool, note: Note | None) -> None:
        self.values, self.note = values, note
        self.calls: list[ModuleCall | None] = []
        self.open: list[tuple[int, nn.Module, tuple[Any, ...], dict[str, Any], int]] = []

    def watch(self, module: nn.Module, names: tuple[str, ...]) -> list[Any]:
        """Hook handles that note every call of the module."""
        return [
            module.register_forward_pre_hook(lambda m, args, kwargs: self._begin(m, args, kwargs), with_kwargs=True),
            module.register_forward_hook(lambda m, _args, output: self._end(m, names, output)),
        ]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = first_argument(args, kwargs)
        version = first._version if isinstance(first, Tensor) else 0
        self.open.append((len(self.calls), module, copied_containers(args), copied_containers(kwargs), version))
        self.calls.append(None)

    def _end(self, module: nn.Module, names: tuple[str, ...], output: Any) -> None:
        while self.open[-1][1] is not module:
            self.open.pop()
        number, _, args, kwargs, version = self.open.pop()
        first = first_argument(args, kwargs)
        answer = first_tensor(output) if isinstance(output, Tensor) or type(output) is tuple else None
        self.calls[number] = ModuleCall(
            names=names,
            n_arguments=len(args) + len(kwargs),
            is_plain=len(args) == 1 and not kwargs,
            input=self._traced(first, version) if isinstance(first, Tensor) else None,
            output=None if answer is None else self._traced(answer, answer._version),
            output_type=type(output),
            args=args if self.values else (),
            kwargs=kwargs if self.values else {},
            result=output if self.values else None,
            note=None if self.note is None else self.note(module, args, output),
        )

    def _traced(self, tensor: Tensor, version: int) -> TracedTensor:
        return TracedTensor(
            shape=tuple(tensor.shape),
            n_bytes=tensor.numel() * tensor.element_size(),
            node=tensor.grad_fn,
            version=tensor._version,
            n_writes=tensor._version - version,
            value=tensor if self.values else None,
        )


def first_argument(args: Any, kwargs: Any) -> Any:
    """The first positional argument of a call, else the first by keyword, None when there is none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def copied_containers(value: Any) -> Any:
    """Arguments with lists and dictionaries as they are now: the model may go on filling them (DenseNet does)."""
    if isinstance(value, dict):
        return {name: copied_containers(inner) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied_containers(inner) for inner in value)
    return value
