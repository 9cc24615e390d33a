"""What makes a model faster and leaves its answers as they are: taken first, so that less has to be removed.

A batch norm behind a convolution is folded into it, and convolutions keep their weights in the memory format that the
device runs faster. Both are tried and timed; what gains nothing here is left alone.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ttmpd.flow import layers_of
from ttmpd.modules import call, clone, evaluating, module_at, prefers_channels_last, replace_module, to_fast_format
from ttmpd.records import UNCHANGED, Lossless
from ttmpd.timing import Rounds, time_models

GAIN = 1.02
"""How many times as fast a model must become for a change to be made."""
MOST = 16
"""Samples on which the choices are compared; the best of them is timed on the whole batch. Several models in turn leave
the memory that they free in pieces, the more the larger the batch."""


def find_lossless(model: nn.Module, batch: Tensor) -> tuple[Lossless, Rounds]:
    """What makes the model faster here without changing it, and the rounds in which that was found.

    Args:
        model: as it is used now; left untouched.
        batch: of the size that latency is promised for, on the model's device.

    Returns:
        The fastest choice, and interleaved milliseconds of "original" and "lossless".
    """
    choices = [UNCHANGED]
    if pairs := foldable(model, batch[:2]):
        choices.append(Lossless(pairs))
    if prefers_channels_last(model):
        choices += [dataclasses.replace(choice, channels_last=True) for choice in choices]
    changed = [choice for choice in choices[1:] if _same(model, applied(model, choice), batch[:2])]
    best = _fastest(model, changed, batch[:MOST])
    if best == UNCHANGED:
        return unchanged(model, batch)
    models = {"original": model, "lossless": applied(model, best)}
    rounds = time_models(models, batch, rounds=7, min_seconds=1.0, max_seconds=5.0)
    return (best, rounds) if rounds.ratio("original", "lossless").median_ms >= GAIN else _as_it_is(rounds)


def _fastest(model: nn.Module, changed: Sequence[Lossless], batch: Tensor) -> Lossless:
    """The change under which the batch takes the least time; none where that gains too little."""
    if not changed:
        return UNCHANGED
    models = {str(choice): applied(model, choice) for choice in changed} | {"original": model}
    rounds = time_models(models, batch, rounds=7, min_seconds=1.0, max_seconds=4.0)
    gains = {choice: rounds.ratio("original", str(choice)).median_ms for choice in changed}
    best = max(changed, key=lambda choice: gains[choice])
    return best if gains[best] >= GAIN else UNCHANGED


def unchanged(model: nn.Module, batch: Tensor) -> tuple[Lossless, Rounds]:
    """The model as it is, and its milliseconds under both names."""
    return _as_it_is(time_models({"original": model}, batch, rounds=7, min_seconds=1.0, max_seconds=5.0))


def _as_it_is(rounds: Rounds) -> tuple[Lossless, Rounds]:
    return UNCHANGED, Rounds(dict.fromkeys(("original", "lossless"), rounds.ms["original"]))


def applied(model: nn.Module, how: Lossless) -> nn.Module:
    """A copy of the model with the change made; what of it is not there any more is passed over."""
    return apply(clone(model), how)


def apply(model: nn.Module, how: Lossless) -> nn.Module:
    """The same in place.

    Args:
        model: in eval mode; a part of a model where the paths say so, see :func:`within`.
        how: what to do.
    """
    modules = dict(model.named_modules())
    for layer, norm in how.folded:
        if layer in modules and isinstance(modules.get(norm), nn.modules.batchnorm._BatchNorm):
            _fold(model, layer, norm)
    return to_fast_format(model) if how.channels_last else model


def present(model: nn.Module, how: Lossless) -> Lossless:
    """The same without the pairs that the model does not have any more."""
    paths = {path for path, _ in model.named_modules()}
    return dataclasses.replace(how, folded=tuple(pair for pair in how.folded if paths.issuperset(pair)))


def within(how: Lossless, path: str, name: str = "") -> Lossless:
    """The same for the module at ``path`` alone, which is called ``name`` now."""
    start, here = f"{path}." if path else "", f"{name}." if name else ""
    pairs = ((a, b) for a, b in how.folded if a.startswith(start) and b.startswith(start))
    folded = tuple((here + a.removeprefix(start), here + b.removeprefix(start)) for a, b in pairs)
    return dataclasses.replace(how, folded=folded)


def with_norms_gone(model: nn.Module, how: Lossless) -> nn.Module:
    """The model as it is built, made ready in place for the weights of a folded one: layers with a bias, no norms."""
    for layer, norm in how.folded:
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
    """What stays of a folded norm: nothing, or the activation that timm's norms hold."""
    return nn.Sequential(*norm.children()) if len(list(norm.children())) else nn.Identity()


def _same(model: nn.Module, other: nn.Module, batch: Tensor) -> bool:
    """Whether both answer alike; not where the other does not run, as with code that views its tensors."""
    with evaluating(model), evaluating(other):
        wanted = call(model, batch)
        try:
            found = call(other, batch)
        except RuntimeError:
            return False
    return bool(torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())))
