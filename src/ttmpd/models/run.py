"""One batch through a model."""

import contextlib
import dataclasses
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
