"""Functions that the checks of several verbs share."""

import random
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ttmpd.method import Method

M = TypeVar("M", bound=Method)
T = TypeVar("T")


def quick(method: M) -> M:
    """The method with as few training steps as a check needs."""
    settings = {"steps": 3, "batch_size": 6, "train_batch_size": 6}
    return method.with_settings(**{key: value for key, value in settings.items() if hasattr(method, key)})


def twice(run: Callable[[], T]) -> tuple[T, T]:
    """The results of two runs that start from different random states."""
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            results.append(run())
    return results[0], results[1]


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """True where two sets of tensors have the same names and values."""
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def answer(model: nn.Module, batch: Tensor) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        output: Tensor = model(batch)
    return output
