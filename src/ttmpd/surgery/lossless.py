"""What makes a model faster and leaves its answers as they are: taken first, so that less has to be removed.

A batch norm behind a convolution is folded into it, and convolutions keep their weights in the memory format that the
device runs faster. Both are tried and timed; what gains nothing here is left alone.
"""

import dataclasses

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ttmpd.models.modules import clone, module_at, replace_module, to_fast_format
from ttmpd.records import Lossless
from ttmpd.surgery.dataflow import layers_of


def applied(model: nn.Module, lossless: Lossless) -> nn.Module:
    """A copy of the model with the changes made; a pair that the model does not have any more is passed over."""
    return apply(clone(model), lossless)


def apply(model: nn.Module, lossless: Lossless) -> nn.Module:
    """Make the changes in place.

    Args:
        model: in eval mode; a part of a model where the paths say so, see :func:`within`.
        lossless: the changes; a pair that the model does not have any more is passed over.
    """
    modules = dict(model.named_modules())
    for layer, norm in lossless.folded:
        if layer in modules and isinstance(modules.get(norm), nn.modules.batchnorm._BatchNorm):
            _fold(model, layer, norm)
    return to_fast_format(model) if lossless.channels_last else model


def present(model: nn.Module, lossless: Lossless) -> Lossless:
    """Those of the changes that the model still has the layers for."""
    paths = {path for path, _ in model.named_modules()}
    return dataclasses.replace(lossless, folded=tuple(pair for pair in lossless.folded if paths.issuperset(pair)))


def within(lossless: Lossless, path: str, name: str = "") -> Lossless:
    """The changes that lie inside the module at ``path``, with paths below ``name``."""
    start, prefix = f"{path}." if path else "", f"{name}." if name else ""
    pairs = ((a, b) for a, b in lossless.folded if a.startswith(start) and b.startswith(start))
    folded = tuple((prefix + a.removeprefix(start), prefix + b.removeprefix(start)) for a, b in pairs)
    return dataclasses.replace(lossless, folded=folded)


def with_norms_gone(model: nn.Module, lossless: Lossless) -> nn.Module:
    """The model as it is built, made ready in place for the weights of a folded one: layers with a bias, no norms."""
    for layer, norm in lossless.folded:
        target = module_at(model, layer)
        assert isinstance(target.weight, Tensor)
        if target.bias is None:
            target.bias = nn.Parameter(target.weight.new_zeros(len(target.weight)))
        replace_module(model, norm, _left(module_at(model, norm)))
    return model


def foldable(model: nn.Module, batch: Tensor) -> tuple[tuple[str, str], ...]:
    """(layer, batch norm that alone reads it) of all pairs that can be folded, in calling order."""
    pairs = [(path, layer.foldable) for path, layer in layers_of(model, batch).items() if layer.foldable]
    return tuple(pair for pair in pairs if _fits(module_at(model, pair[0])))


def _fits(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _fold(model: nn.Module, path: str, norm_path: str) -> None:
    layer, norm = module_at(model, path), module_at(model, norm_path)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    assert norm.running_mean is not None and norm.running_var is not None
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    replace_module(model, norm_path, _left(norm))


def _left(norm: nn.Module) -> nn.Module:
    """What takes the place of a folded norm: an identity, or the activation that timm's norms hold."""
    return nn.Sequential(*norm.children()) if len(list(norm.children())) else nn.Identity()
