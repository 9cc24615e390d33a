"""Look inside a model: paths, hooks that clean up, taps, the head, nested outputs."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ttmpd.errors import InvalidValueError, ModelError
from ttmpd.records import Tap
from ttmpd.text import answered


class StopForwardError(Exception):
    """Ends a forward pass early, once everything that was asked for has been seen; never leaves this package."""


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nested output, ``logits`` before anything else."""
    if isinstance(value, Tensor):
        return value
    if getattr(value, "logits", None) is not None:
        return cast(Tensor, value.logits)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((t for t in map(first_tensor, value) if t is not None), None)
    return None


def with_first(value: Any, tensor: Tensor) -> Any:
    """``value`` with its first tensor replaced: keeps the tuple that a block answers with."""
    if isinstance(value, tuple) and type(value) is tuple:
        return (tensor, *value[1:])
    return tensor


def call(model: nn.Module, batch: Tensor) -> Tensor:
    """The model's logits for a batch, (B, n_classes).

    Of a model that answers each token, (M, n_classes): sample by sample those that count, see
    :func:`ttmpd.text.answered`.
    """
    logits = first_tensor(model(batch))
    if logits is None:
        raise ModelError(f"{type(model).__name__} must answer with a tensor, but answered without one")
    tokens = answered(model, batch)
    return logits if tokens is None or logits.dim() != 3 else logits[tokens]


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


def clone(model: nn.Module) -> nn.Module:
    """An independent copy: own weights, no hooks shared."""
    return copy.deepcopy(model)


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[nn.Module]:
    """Run ``model`` in eval mode; train flags, gradients and the random state are as found afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    for parameter in model.parameters():
        parameter.grad = None  # a backward pass would add to what was found
    with torch.random.fork_rng(enabled=True), torch.set_grad_enabled(gradients):
        try:
            yield model
        finally:
            for module, training in flags:
                module.training = training
            for parameter, requires_grad, grad in wanted:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


@contextlib.contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hook handles on the way out, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def stubbed(model: nn.Module, stubs: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """While active, the modules at the given paths are not run: the stubs answer in the place of their ``forward``.

    Only ``forward`` is exchanged, on the instance; weights and hooks stay as they are.
    """
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for path, stub in stubs.items():
            module = module_at(model, path)
            changed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = stub
        yield
    finally:
        for module, own in reversed(changed):
            module.__dict__.pop("forward")
            if own is not None:
                module.__dict__["forward"] = own


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Mapping[str, Tap], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """While active, every forward pass leaves the tensors at ``taps`` in the dictionary that is yielded.

    Args:
        model: the model to read from.
        taps: name -> place.
        stop: raise :class:`StopForwardError` as soon as all taps have been read (see :func:`prefix`).
    """
    seen: dict[str, Tensor] = {}
    place: list[Tensor | None] = [None]
    handles = [_noting_places(model, place)] if any(tap.token != "all" for tap in taps.values()) else []

    def note(name: str, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is not None:
            seen[name] = tensor if taps[name].token == "all" else _at_tokens(tensor, place[0])
        if stop and len(seen) == len(taps):
            raise StopForwardError

    for name, tap in taps.items():
        module = module_at(model, tap.path)
        if tap.side == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: note(name, args or kwargs), with_kwargs=True
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: note(name, out)))
    with hooks(handles):
        yield seen


def _noting_places(model: nn.Module, place: list[Tensor | None]) -> Any:
    """A hook that notes, at every call, which tokens the answers are of: (B, S) those that count, or (B,) the last."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        ids, mask = first_tensor(args or kwargs), kwargs.get("attention_mask")  # of the call, or of the model's hook
        place[0] = None if ids is None else answered(model, ids)
        if place[0] is None and mask is not None:
            place[0] = mask.long().cumsum(1).argmax(1)

    return model.register_forward_pre_hook(before, with_kwargs=True)


def _at_tokens(value: Tensor, place: Tensor | None) -> Tensor:
    """(B, ...) or (M, ...) of (B, S, ...): each sample at its place, or the tokens that count; else the last ones."""
    if place is None:
        return value[:, -1]
    return value[place] if place.dim() == 2 else value[torch.arange(len(value), device=value.device), place]


def read(model: nn.Module, batch: Tensor, taps: Mapping[str, Tap]) -> dict[str, Tensor]:
    """The tensors at ``taps`` for one batch; the rest of the network after the last tap is not run."""
    with tapped(model, taps, stop=True) as seen, contextlib.suppress(StopForwardError):
        model(batch)
    return seen


def find_head(model: nn.Module, batch: Tensor) -> str | None:
    """Path of the layer that gives the logits, or None when no single layer does."""
    tap = _head_tap(model, batch)
    return None if tap is None else tap.path


def _head_tap(model: nn.Module, batch: Tensor) -> Tap | None:
    """The input of the layer that gives the logits; of the tokens whose answers count, where it answers each."""
    leaves = {name: m for name, m in model.named_modules() if name and not list(m.children()) and _is_matrix(m)}
    answers: dict[str, Tensor] = {}
    place: list[Tensor | None] = [None]
    handles = [
        m.register_forward_hook(
            lambda _m, _a, out, name=name: answers.__setitem__(name, cast(Tensor, first_tensor(out)))
        )
        for name, m in leaves.items()
    ]
    with evaluating(model), hooks([*handles, _noting_places(model, place)]):
        logits = call(model, batch)
    for name in reversed(answers):
        found = answers[name]
        if found is None:
            continue
        if logits.dim() == 2 and found.dim() == 3 and found.shape[:2] == batch.shape:
            if torch.equal(_at_tokens(found, place[0]), logits):
                each = place[0] is not None and place[0].dim() == 2  # else a decoder that classifies by its last token
                return Tap(name, "input", "each" if each else "last")
        elif found.numel() == logits.numel() and torch.equal(found.flatten(), logits.flatten()):
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


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: nn.Module, batch: Tensor) -> dict[str, int]:
    """Multiply-accumulates per sample of every module by path; the whole model under ""."""
    with evaluating(model), _in_parts(), FlopCounterMode(display=False) as counter:
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # the counter follows gradients even where there are none
        model(batch)
    root = type(model).__name__
    macs = {"": counter.get_total_flops() // 2 // len(batch)}
    for name, counts in counter.get_flop_counts().items():
        path = name.removeprefix(root).lstrip(".")
        if path and name != "Global":
            macs[path] = sum(counts.values()) // 2 // len(batch)
    return macs


@contextlib.contextmanager
def _in_parts() -> Iterator[None]:
    """While active, attention and torch's own transformer layers run as the operations they consist of.

    Fused, they are counted on some devices and on others not.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def has_nan(tensor: Tensor) -> bool:
    """Whether any value is NaN or infinite."""
    return not bool(torch.isfinite(tensor).all())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer normalises over the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def prefers_channels_last(model: nn.Module) -> bool:
    """Whether the model is convolutional, so that the channels_last memory format pays."""
    return any(isinstance(m, nn.Conv2d) for m in model.modules())


def to_fast_format(model: nn.Module) -> nn.Module:
    """The model in channels_last when it is convolutional (in place; values are unchanged)."""
    return model.to(memory_format=torch.channels_last) if prefers_channels_last(model) else model


def to_plain_format(model: nn.Module) -> nn.Module:
    """The model with contiguous weights (in place; values are unchanged)."""
    return model.to(memory_format=torch.contiguous_format)
