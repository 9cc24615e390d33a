"""What a module must be before it is worked on: wrappers are taken off, computed weights made plain, the rest refused.

A wrapper hides modules and renames weights; a weight that is computed from others (weight norm, spectral norm, pruning
masks) is neither cut nor fitted by setting it; a quantised, missing or lazy weight is none yet.
"""

import functools
import logging
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.models.modules import clone
from ttmpd.models.run import evaluating

_log = logging.getLogger(__name__)

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
}
"""Class of a wrapper that answers as the module in it does -> the attribute that holds that."""
_QUANTISED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.quantized",
    "bitsandbytes",
    "torchao",
)
"""Beginnings of the modules that define layers with quantised weights."""


def admitted(module: nn.Module) -> nn.Module:
    """The module itself, or what has to be worked on in its place; it is left as it is.

    ``torch.compile`` and data-parallel wrappers are taken off. Of weights that are computed from others at every call
    (``weight_norm``, ``spectral_norm``, parametrizations, pruning masks) a copy has the values instead, which changes
    no answer in eval mode. Both are said once, as a warning.

    Args:
        module: of the user.

    Raises:
        UnsupportedError: it has quantised layers, or is a TorchScript module.
        ModelError: it has weights without values (on the meta device, or lazy ones), of another precision than
            float32, or none at all.

    Example:
        >>> net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> [name for name, _ in admitted(net).named_parameters()]
        ['bias', 'weight']
    """
    inner = unwrapped(module)
    _refuse(inner)
    computed = [folds for part in inner.modules() for folds in _computed_weights(part)]
    if not computed:
        return inner
    plain = clone(inner)
    with evaluating(plain):
        for part in list(plain.modules()):
            for make_plain in list(_computed_weights(part)):
                make_plain()
    _log.warning(
        "%s computes weights from others %d times (weight norm, a parametrization or a pruning mask): a copy with "
        "their values is used, which answers the same",
        type(inner).__name__,
        len(computed),
    )
    return plain


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and data-parallel wrappers, however many there are."""
    while isinstance(inner := getattr(module, WRAPPERS.get(type(module).__name__, ""), None), nn.Module):
        _log.warning("%s is taken off: the %s in it is used", type(module).__name__, type(inner).__name__)
        module = inner
    return module


def _refuse(module: nn.Module) -> None:
    """Raise where there are no weights that could be worked on."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"a model must be Python code, but {name} is TorchScript; pass the module it was made from"
        )
    for path, part in module.named_modules():
        if type(part).__module__.startswith(_QUANTISED):
            raise UnsupportedError(
                f"{name} must have floating-point layers, but {path or name} is a quantised {type(part).__name__}; "
                "compress the float model, then quantise the result"
            )
        if isinstance(part, nn.modules.lazy.LazyModuleMixin) and part.has_uninitialized_params():  # type: ignore[misc]
            raise ModelError(
                f"{name} must know the shapes of its weights, but {path or name} is a lazy {type(part).__name__} that "
                "never ran; run the model once on a batch first"
            )
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for path, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"{name} must have weights, but {path} is on the meta device, which holds shapes alone; load "
                "the weights first"
            )
        if tensor.is_quantized:
            raise UnsupportedError(
                f"{name} must have floating-point weights, but {path} is {tensor.dtype}; compress the float model, "
                "then quantise the result"
            )
    for path, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(
                f"{name} must have float32 weights, but {path} is {kind}; pass model.float(), and convert the result "
                f"with .to({parameter.dtype})"
            )
    if not any(parameter.is_floating_point() for parameter in module.parameters()):
        raise ModelError(f"{name} must have floating-point weights, but has none; pass a network that has been trained")


def _computed_weights(module: nn.Module) -> Iterator[Callable[[], object]]:
    """Calls that make those weights of the module itself plain that are computed whenever it is used."""
    if parametrize.is_parametrized(module):
        yield functools.partial(_without_parametrizations, module)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod):
            yield functools.partial(_without_hook, module, key, hook)


def _without_parametrizations(module: nn.Module) -> None:
    """Let all parametrizations of a module leave their values.

    Not by ``remove_parametrizations``: that takes properties from the class, which copies of the module share.
    """
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in parametrizations}
    trained = {name for name, each in parametrizations.items() if list(each.parameters(recurse=False))}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        if name in trained:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)


def _without_hook(module: nn.Module, key: int, hook: WeightNorm | SpectralNorm | prune.BasePruningMethod) -> None:
    """Let a hook that computes a weight leave its value, and take the hook off."""
    hook.remove(module)
    del module._forward_pre_hooks[key]
    if isinstance(hook, SpectralNorm):
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for number, other in list(hooks.items()):
                if "spectral_norm" in type(getattr(other, "hook", other)).__module__:
                    del hooks[number]
