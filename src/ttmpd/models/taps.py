"""Features at a path, the output layer, and where the final features are."""

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ttmpd.models.modules import hooks, module_at
from ttmpd.models.run import StopForwardError, evaluating, first_tensor, predict
from ttmpd.models.tokens import predicted_token_mask


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor to read in a model: the first input or the output of a module.

    Of a tensor with an axis of tokens, ``token`` "last" reads the last one that is no padding, (B, S, ...) to (B, ...),
    and "each" those whose predictions count, (B, S, ...) to (M, ...).
    """

    path: str
    side: Literal["input", "output"]
    token: Literal["all", "last", "each"] = "all"


K = TypeVar("K", bound=Hashable)


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Mapping[K, Tap], stop: bool = False) -> Iterator[dict[K, Tensor]]:
    """While active, every forward pass puts the tensors at ``taps`` into the dictionary that is yielded.

    Args:
        model: the model to read from.
        taps: by any key.
        stop: raise :class:`StopForwardError` as soon as all taps have been read (see :func:`read_taps`).
    """
    values: dict[K, Tensor] = {}
    token_index: list[Tensor | None] = [None]
    handles = [_noting_tokens(model, token_index)] if any(tap.token != "all" for tap in taps.values()) else []

    def note(key: K, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is not None:
            values[key] = tensor if taps[key].token == "all" else _at_tokens(tensor, token_index[0])
        if stop and len(values) == len(taps):
            raise StopForwardError

    for key, tap in taps.items():
        module = module_at(model, tap.path)
        if tap.side == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, key=key: note(key, args or kwargs), with_kwargs=True
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, out, key=key: note(key, out)))
    with hooks(handles):
        yield values


def _noting_tokens(model: nn.Module, token_index: list[Tensor | None]) -> Any:
    """Handle of a hook that notes, at every call, which tokens are predicted: a (B, S) mask, or (B,) the last ones."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        ids, mask = first_tensor(args or kwargs), kwargs.get("attention_mask")  # of the call, or of the model's hook
        token_index[0] = None if ids is None else predicted_token_mask(model, ids)
        if token_index[0] is None and mask is not None:
            token_index[0] = mask.long().cumsum(1).argmax(1)

    return model.register_forward_pre_hook(before, with_kwargs=True)


def _at_tokens(value: Tensor, token_index: Tensor | None) -> Tensor:
    """(B, ...) or (M, ...) of (B, S, ...): the token at each sample's index, or those of the mask; else the last."""
    if token_index is None:
        return value[:, -1]
    if token_index.dim() == 2:
        return value[token_index]
    return value[torch.arange(len(value), device=value.device), token_index]


def read_taps(model: nn.Module, batch: Tensor, taps: Mapping[K, Tap]) -> dict[K, Tensor]:
    """The tensors at ``taps`` for one batch; layers after the last tap are not run.

    Args:
        model: to read from.
        batch: on its device.
        taps: by any key.

    Cost: one forward pass up to the last tap.
    """
    with tapped(model, taps, stop=True) as values, contextlib.suppress(StopForwardError):
        model(batch)
    return values


def find_output_layer(model: nn.Module, batch: Tensor) -> str | None:
    """Path of the layer that gives the logits, or None when no single layer does."""
    tap = _head_tap(model, batch)
    return None if tap is None else tap.path


def _head_tap(model: nn.Module, batch: Tensor) -> Tap | None:
    """The input of the layer that gives the logits; of the tokens whose answers count, where it answers each."""
    leaves = {name: m for name, m in model.named_modules() if name and not list(m.children()) and _is_matrix(m)}
    outputs: dict[str, Tensor] = {}
    token_index: list[Tensor | None] = [None]
    handles = [
        m.register_forward_hook(
            lambda _m, _a, out, name=name: outputs.__setitem__(name, cast(Tensor, first_tensor(out)))
        )
        for name, m in leaves.items()
    ]
    with evaluating(model), hooks([*handles, _noting_tokens(model, token_index)]):
        logits = predict(model, batch)
    for name in reversed(outputs):
        output = outputs[name]
        if output is None:
            continue
        if logits.dim() == 2 and output.dim() == 3 and output.shape[:2] == batch.shape:
            if torch.equal(_at_tokens(output, token_index[0]), logits):
                per_token = token_index[0] is not None and token_index[0].dim() == 2
                return Tap(name, "input", "each" if per_token else "last")  # the last: a decoder that classifies
        elif output.numel() == logits.numel() and torch.equal(output.flatten(), logits.flatten()):
            return Tap(name, "input")
    return None


def find_feature_tap(model: nn.Module, batch: Tensor, pooled: bool = False) -> Tap | None:
    """Where the final features are read: the last feature map before pooling, else the input of the head.

    Args:
        model: any classifier.
        batch: a few samples.
        pooled: always take the input of the head.

    Returns:
        The tap, or None when the model has no single head (then only its logits can be mimicked).
    """
    head_tap = _head_tap(model, batch)
    if head_tap is None:
        return None
    head = head_tap.path
    width = cast(Tensor, module_at(model, head).weight).shape[1]
    maps: list[str] = []
    reached_head = False

    def finish(name: str, output: Any) -> None:
        output = output[0] if type(output) is tuple and output else output
        # A map before pooling: 4 axes, as wide as the head's input, more than one position.
        if reached_head or not isinstance(output, Tensor) or output.dim() != 4:
            return
        if width in (output.shape[1], output.shape[3]) and output[0].numel() > width:
            maps.append(name)

    def pass_on(*_: Any) -> None:
        if not reached_head:
            maps.clear()

    def reach(*_: Any) -> None:
        nonlocal reached_head
        reached_head = True

    handles = [m.register_forward_hook(lambda _m, _a, out, n=n: finish(n, out)) for n, m in model.named_modules() if n]
    # What runs through more weights on its way to the head is not final: the patches of a vision transformer, say.
    matrices = [m for m in model.modules() if any(p.dim() >= 2 for p in m.parameters(recurse=False))]
    handles += [m.register_forward_pre_hook(pass_on) for m in matrices if m is not module_at(model, head)]
    handles.append(module_at(model, head).register_forward_pre_hook(reach))
    with evaluating(model), hooks(handles):
        model(batch)
    if pooled or not maps:
        return head_tap
    return Tap(maps[-1], "output")


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2
