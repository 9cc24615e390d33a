"""For checks and tests: a model of a few thousand weights, samples, and a check that a call leaves them untouched."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.models.tiny import (
    TinyAttention,
    TinyBlock,
    TinyLayer,
    TinyNet,
    TinyTransformer,
    tiny_model,
    tiny_tokens,
    tiny_transformer,
)
from ttmpd.records import Unit
from ttmpd.surgery.find import find_units, kind_of, kinds_of

__all__ = [
    "TinyAttention",
    "TinyBlock",
    "TinyLayer",
    "TinyNet",
    "TinyTransformer",
    "assert_untouched",
    "example_of_kind",
    "require",
    "tiny_model",
    "tiny_samples",
    "tiny_token_samples",
    "tiny_tokens",
    "tiny_transformer",
    "tiny_units",
]


def tiny_token_samples(n: int = 12, seed: int = 1) -> Samples:
    """Random token ids as samples, for :func:`tiny_transformer`."""
    return Samples(tiny_tokens(n, seed), tuple(f"{seed}-{i}" for i in range(n)))


def tiny_samples(n: int = 12, seed: int = 1) -> Samples:
    """Random 8 x 8 images, as pixels."""
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Samples(pixels, tuple(f"{seed}-{i}" for i in range(n)), mean=(0.5,) * 3, std=(0.25,) * 3)


def example_of_kind(kind: str, n: int = 12) -> tuple[nn.Module, Samples]:
    """The example of a kind of unit, with ``n`` samples for it."""
    model, batch = kind_of(kind).example(n)
    return model, Samples(batch, tuple(map(str, range(n))))


def tiny_units(model: nn.Module) -> tuple[Unit, ...]:
    """The depth units of the model: those that are removed as a whole."""
    return find_units(model, tiny_samples(2).batch(slice(None)), kinds_of("depth")).units


def require(holds: bool, message: str) -> None:
    """Raise :class:`AssertionError` with the message unless it holds; unlike ``assert``, also under ``python -O``."""
    if not holds:
        raise AssertionError(message)


@contextlib.contextmanager
def assert_untouched(model: nn.Module, samples: Samples | None = None) -> Iterator[None]:
    """Check that the block leaves model, samples and random state as it found them.

    Train flags, gradients and ``requires_grad`` are set to a mixture first, so that a reset to any one value shows.
    """
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.full_like(parameter, 0.5) if number % 2 else None
    before, pixels = _facts(model), None if samples is None else samples.inputs.clone()
    drawn = torch.get_rng_state(), random.getstate()
    yield
    after = _facts(model)
    for key, value in before.items():
        now = after.get(key)
        if isinstance(value, Tensor):
            require(isinstance(now, Tensor) and torch.equal(value, now), f"{key} of the model must stay as it was")
        else:
            require(not isinstance(now, Tensor) and value == now, f"{key} of the model must stay as it was")
    require(before.keys() == after.keys(), f"the model must gain nothing, but got {set(after) ^ set(before)}")
    if samples is not None and pixels is not None:
        require(torch.equal(samples.inputs, pixels), "the samples must stay as they were")
    require(torch.equal(drawn[0], torch.get_rng_state()), "the random state of torch must stay as it was")
    require(drawn[1] == random.getstate(), "the random state of Python must stay as it was")


def _facts(model: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {f"value {k}": v.detach().clone() for k, v in model.state_dict().items()}
    for path, module in model.named_modules():
        facts[f"module {path}"] = id(module)
        facts[f"train mode {path}"] = module.training
        facts[f"attributes {path}"] = sorted(module.__dict__)
        facts[f"hooks {path}"] = {k: len(v) for k, v in module.__dict__.items() if k.endswith("_hooks")}
    for path, parameter in model.named_parameters():
        facts[f"requires_grad {path}"] = parameter.requires_grad
        facts[f"gradient {path}"] = None if parameter.grad is None else parameter.grad.clone()
    return facts
