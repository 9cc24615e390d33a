"""What checks of several verbs use."""

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
    few = {"steps": 3, "batch_size": 6, "train_batch_size": 6}
    return method.with_settings(**{key: value for key, value in few.items() if hasattr(method, key)})


def twice(run: Callable[[], T]) -> tuple[T, T]:
    """The answers of two runs that start from different random states."""
    answers = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            answers.append(run())
    return answers[0], answers[1]


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and values."""
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def answer(model: nn.Module, batch: Tensor) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        output: Tensor = model(batch)
    return output
