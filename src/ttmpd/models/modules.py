"""Modules of a model by path: found, replaced, hooked and patched for a while, copied, counted."""

import collections
import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        InvalidValueError: the model has no such module.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise InvalidValueError(f"path must name a module of {type(model).__name__}, but got {path!r}") from None


def common_path(*paths: str) -> str:
    """Path of the smallest module that holds those at the paths; "" is the whole model."""
    names = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(same[0] for same in itertools.takewhile(lambda at: len(set(at)) == 1, names))


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` where ``path`` points, in place; under every name that the model has for that module."""
    old = module_at(model, path)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def clone(model: nn.Module, shared: Sequence[nn.Module] = ()) -> nn.Module:
    """An independent copy: own weights, no hooks shared; but for modules in it that are not copied.

    Tensors that a pass with gradients left on the model (a feature map for a heat map, a cache of eval mode) are copied
    without their graph, which cannot be copied.
    """
    left = [tensor for module in model.modules() for tensor in _computed_in(vars(module), set())]
    copies: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in left}
    return copy.deepcopy(model, copies | {id(module): module for module in shared})


def _computed_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors with a graph in nested containers and plain objects; modules are looked at by themselves."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
        return
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts: Iterable[Any] = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        parts = list(value)
    else:
        parts = list(vars(value).values()) if hasattr(value, "__dict__") and not callable(value) else ()
    for part in parts:
        yield from _computed_in(part, seen)


@contextlib.contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hook handles on the way out, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def patched_forward(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """While active, the modules at the given paths run another function in place of their ``forward``.

    Only ``forward`` is replaced, on the instance; weights and hooks stay as they are.
    """
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for path, function in functions.items():
            module = module_at(model, path)
            changed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = function
        yield
    finally:
        for module, original in reversed(changed):
            module.__dict__.pop("forward")
            if original is not None:
                module.__dict__["forward"] = original


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in module.parameters())


def has_nan(tensor: Tensor) -> bool:
    """True if any value is NaN or infinite."""
    return not bool(torch.isfinite(tensor).all())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer normalises over the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


_PLAIN = "ttmpd_plain_format"


def keep_plain_format(model: nn.Module) -> None:
    """Let a model and its later copies say that they run in contiguous memory alone (``x.view(len(x), -1)``)."""
    model.__dict__[_PLAIN] = True


def prefers_channels_last(model: nn.Module) -> bool:
    """Whether the model is convolutional, so that the channels_last memory format pays, and runs in it."""
    modules = list(model.modules())
    return any(isinstance(m, nn.Conv2d) for m in modules) and not any(_PLAIN in vars(m) for m in modules)


def to_fast_format(model: nn.Module) -> nn.Module:
    """The model in channels_last when it is convolutional (in place; values are unchanged)."""
    return model.to(memory_format=torch.channels_last) if prefers_channels_last(model) else model


def to_plain_format(model: nn.Module) -> nn.Module:
    """The model with contiguous weights (in place; values are unchanged)."""
    return model.to(memory_format=torch.contiguous_format)
