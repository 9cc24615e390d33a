"""A model of a few thousand weights, samples for it, and a look at what a call leaves behind: for checks and tests."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.records import Unit
from ttmpd.surgery.units.block import Block


class TinyBlock(nn.Module):
    """A residual block that ends in a ReLU."""

    def __init__(self, channels: int, hidden: int = 0) -> None:
        super().__init__()
        hidden = hidden or channels
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        branch: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (x + branch).relu()


class TinyNet(nn.Module):
    """Three residual blocks between a stem and a head: (B, 3, 8, 8) images, 4 classes."""

    def __init__(self, n_blocks: int = 3, channels: int = 6, dropout: float = 0.0, hidden: int = 0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(*[TinyBlock(channels, hidden) for _ in range(n_blocks)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) logits."""
        logits: Tensor = self.head(self.dropout(self.blocks(self.stem(x)).mean((2, 3))))
        return logits


def tiny_model(seed: int = 0, *, n_blocks: int = 3, dropout: float = 0.0, hidden: int = 0) -> TinyNet:
    """A :class:`TinyNet` in eval mode whose weights and batch statistics are drawn by ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyNet(n_blocks, dropout=dropout, hidden=hidden).train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # one pass makes statistics that fit the weights
        model(torch.randn(32, 3, 8, 8))
        for norm in norms:
            norm.momentum = 0.1
        nn.init.normal_(model.head.weight)
    return model.eval()


class TinyAttention(nn.Module):
    """Self-attention with its heads in one matrix."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
        query, key, value = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        answer: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return answer


class TinyLayer(nn.Module):
    """A transformer block: attention and a gated MLP, each beside a shortcut."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = TinyAttention(width, num_heads)
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        answer: Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return answer


class TinyTransformer(nn.Module):
    """Two blocks on (B, 6, 16) tokens, 4 classes from their mean."""

    def __init__(self, width: int = 16, num_heads: int = 4, hidden: int = 32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[TinyLayer(width, num_heads, hidden) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) logits."""
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def tiny_transformer(seed: int = 0) -> TinyTransformer:
    """A :class:`TinyTransformer` in eval mode whose weights are drawn by ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyTransformer().eval()


def tiny_tokens(n: int = 4, seed: int = 1) -> Tensor:
    """(n, 6, 16) random tokens for :class:`TinyTransformer`."""
    return torch.randn(n, 6, 16, generator=torch.Generator().manual_seed(seed))


def tiny_token_samples(n: int = 12, seed: int = 1) -> Samples:
    """The same as samples."""
    return Samples(tiny_tokens(n, seed), tuple(f"{seed}-{i}" for i in range(n)))


def tiny_samples(n: int = 12, seed: int = 1) -> Samples:
    """Random 8 x 8 images, as pixels."""
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Samples(pixels, tuple(f"{seed}-{i}" for i in range(n)), mean=(0.5,) * 3, std=(0.25,) * 3)


def specimen(kind: str, n: int = 12) -> tuple[nn.Module, Samples]:
    """A model that holds at least two units of the kind, and samples for it."""
    if kind in ("head", "neuron"):
        return tiny_transformer(), tiny_token_samples(n)
    return tiny_model(hidden=24 if kind == "channel" else 0), tiny_samples(n)


def tiny_units(model: nn.Module) -> tuple[Unit, ...]:
    """The blocks of the model."""
    return Block().find(model, tiny_samples(2).batch(slice(None))).units


def require(holds: bool, message: str) -> None:
    """Raise :class:`AssertionError` with the message unless it holds; unlike ``assert``, also under ``python -O``."""
    if not holds:
        raise AssertionError(message)


@contextlib.contextmanager
def untouched(model: nn.Module, samples: Samples | None = None) -> Iterator[None]:
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
