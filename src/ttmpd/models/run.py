"""One batch through a model."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.errors import ModelError
from ttmpd.models.tokens import carried_task, predicted_token_mask


def predictions_of(model: nn.Module, samples: Samples, batch_size: int) -> Tensor:
    """(N, n_classes) logits of all samples, in eval mode, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        batches = samples.batches(batch_size, device)
        answers = [predict(model, batch).float().cpu() for batch in batches]
    return torch.cat(answers) if answers else torch.empty(0)


class StopForwardError(Exception):
    """Ends a forward pass early, once everything that was asked for has been seen; never leaves this package."""


def output_tensors(value: Any) -> tuple[Tensor, ...]:
    """All tensors in a model's output, in their order: of tuples, lists, dicts and dataclasses, however nested.

    For proofs that two models answer alike: what no task predicts is compared, too.

    Args:
        value: the output, as the model returned it.

    Example:
        >>> [tensor.shape[-1] for tensor in output_tensors({"logits": torch.zeros(2, 5), "more": (torch.zeros(2, 3),)})]
        [5, 3]
    """
    if isinstance(value, Tensor):
        return (value,)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(tensor for part in value for tensor in output_tensors(part))
    return ()


MIN_SCALE = 1e-3
"""Largest value of an output below which differences are rounding of larger intermediate values."""

ROUNDING = 1e-4
"""Tolerance for the same operations on the same weights in another order: single precision loses about 1e-7 of the
scale per operation, and a few hundred of them follow each other in a deep network."""

OTHER_KERNELS = 1e-3
"""Tolerance for weights that were multiplied out (folded batch norms, temperatures) and for other kernels and memory
formats: convolutions by another algorithm, or with TF32, keep three digits."""

OTHER_BATCH_SIZE = 1e-2
"""Tolerance for the same samples in a batch of another size: every layer may choose another kernel."""


def same_outputs(first: Any, second: Any, tolerance: float = ROUNDING) -> bool:
    """True if two outputs of a model agree in every tensor, whatever is nested where.

    A tensor agrees if no value differs by more than ``tolerance`` times the largest value of the second; that is taken
    as :data:`MIN_SCALE` at least, since intermediate values of order one are rounded, too. Integers must be equal.

    Args:
        first: an output: a tensor, or any nesting of tensors.
        second: the output that it should be equal to.
        tolerance: :data:`ROUNDING`, :data:`OTHER_KERNELS` or :data:`OTHER_BATCH_SIZE`, by what the runs
            differ in.

    Example:
        >>> same_outputs((torch.ones(2), {"more": torch.ones(3)}), (torch.ones(2), {"more": torch.zeros(3)}))
        False
    """
    pairs = itertools.zip_longest(output_tensors(first), output_tensors(second))
    return all(a is not None and b is not None and _same(a, b, tolerance) for a, b in pairs)


def _same(first: Tensor, second: Tensor, tolerance: float) -> bool:
    if first.shape != second.shape:
        return False
    if not second.is_floating_point() or not second.numel():
        return torch.equal(first, second)
    finite = second.detach()[second.isfinite()]
    scale = max(MIN_SCALE, float(finite.abs().max())) if len(finite) else MIN_SCALE
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)


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


def predict(model: nn.Module, batch: Tensor) -> Tensor:
    """The model's predictions for a batch as its task reads them, (rows, values): of classes the logits.

    Of a model that answers each token, (M, n_classes): sample by sample those that count, see
    :func:`ttmpd.models.tokens.predicted_token_mask`.
    """
    output, task = model(batch), carried_task(model)
    if task is not None:
        outputs: Tensor = task.outputs(output, batch)
        return outputs
    logits = first_tensor(output)
    if logits is None:
        raise ModelError(f"{type(model).__name__} must answer with a tensor, but answered without one")
    tokens = predicted_token_mask(model, batch)
    return logits if tokens is None or logits.dim() != 3 else logits[tokens]


def forget_caches(model: nn.Module) -> None:
    """Let modules make anew what they keep in eval mode, in place: weights, or a graph of gradients, may have changed.

    Attention of several families keeps its biases until it is put into train mode (LeViT, EfficientFormer, TinyViT).
    """
    keeping = [module for module in model.modules() if type(module).train is not nn.Module.train]
    if not keeping:
        return
    flags = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in keeping:
        module.train(True)
    for module, training in flags:
        module.training = training
    for parameter, requires_grad in learning:
        parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[nn.Module]:
    """Run ``model`` in eval mode; train flags, gradients and the random state are as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    gradients_before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    forget_caches(model)
    for parameter in model.parameters():
        parameter.grad = None  # a backward pass would add to what is there
    with torch.random.fork_rng(enabled=True), torch.set_grad_enabled(gradients):
        try:
            yield model
        finally:
            for module, training in flags:
                module.training = training
            for parameter, requires_grad, grad in gradients_before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
