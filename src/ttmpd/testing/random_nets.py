"""Small networks drawn at random from what people build, for checks that hold for every model."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.distill.one_time import OneTime
from ttmpd.errors import TTMPDError
from ttmpd.models.run import output_tensors, same_outputs
from ttmpd.testing.tiny_models import require

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Axes beside the channels -> the convolution along them."""
_NORMS: dict[int, Callable[[int], nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_SIDES = {0: (), 1: (20,), 2: (8, 8), 3: (4, 6, 6)}
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.relu, F.gelu, F.silu, F.relu6, torch.tanh)
TOKENS = -1
"""In the place of the number of axes: a sequence of vectors."""


class RandomNet(nn.Module):
    """A stem, blocks of many forms, pooling, and one or two heads, all drawn by a seed.

    Args:
        seed: of the architecture and the weights.

    Example:
        >>> net = RandomNet(3)
        >>> len(net(net.inputs(2))) >= 1
        True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.axes = draw.choice([0, 1, 2, 2, 2, 3, TOKENS, TOKENS])
            self.width, self.n_in = draw.choice([8, 12, 16]), draw.choice([1, 3, 4])
            self.stem = self._stem(draw)
            self.blocks = self._blocks(draw)
            self.pooling = draw.choice(["mean", "view", "adaptive"]) if self.axes > 0 else "mean"
            n_features = self.width * (self._n_positions if self.pooling == "view" else 1)
            self.head = nn.Linear(n_features, 4)
            self.second = nn.Linear(n_features, 3) if draw.random() < 0.2 else None
            self.form = draw.choice(["tensor", "tensor", "tensor", "dict", "tuple"])
            self.keeps = draw.random() < 0.1
            if draw.random() < 0.1:
                for module in list(self.blocks.modules()):
                    if isinstance(module, nn.Linear):
                        nn.utils.parametrizations.weight_norm(module)
        self.eval()

    def inputs(self, n: int, seed: int = 0) -> Tensor:
        """``n`` random samples."""
        shape = (n, 6, self.n_in) if self.axes == TOKENS else (n, self.n_in, *_SIDES[self.axes])
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    @property
    def _n_positions(self) -> int:
        return int(torch.tensor(_SIDES[self.axes]).prod()) if self.axes > 0 else 1

    def _stem(self, draw: random.Random) -> nn.Module:
        if self.axes <= 0:
            return nn.Linear(self.n_in, self.width)
        return CONVOLUTIONS[self.axes](self.n_in, self.width, draw.choice([1, 3]), padding="same")

    def _blocks(self, draw: random.Random) -> nn.Module:
        kinds = (Attention, Mlp, Mlp) if self.axes == TOKENS else (Mlp,) if self.axes == 0 else (Convolutional,)
        blocks = [draw.choice(kinds)(self.width, self.axes, draw) for _ in range(draw.randint(2, 5))]
        if draw.random() < 0.15:
            blocks.append(blocks[0])  # one module, called twice
        mlps = [block for block in blocks if isinstance(block, Mlp)]
        if draw.random() < 0.15 and len(mlps) > 1 and mlps[0].up.weight.shape == mlps[1].up.weight.shape:
            mlps[1].up.weight = mlps[0].up.weight
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Any:
        """Scores of four classes, alone or beside others."""
        x = self.blocks(self.stem(x))
        if self.keeps:
            self.last = x
        if self.axes == TOKENS:
            x = x.mean(1)
        elif self.pooling == "view":
            x = x.contiguous().view(len(x), -1) if x.dim() != 4 else x.view(len(x), -1)
        elif self.pooling == "adaptive" and self.axes > 0:
            pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.axes - 1]
            x = pool(x, 1).flatten(1)
        elif self.axes > 0:
            x = x.flatten(2).mean(2)
        scores = self.head(x)
        others = () if self.second is None else (self.second(x),)
        if self.form == "dict":
            return {"logits": scores} | ({"others": others[0]} if others else {})
        return (scores, *others) if self.form == "tuple" or others else scores


class Convolutional(nn.Module):
    """A residual, gated or plain block of convolutions."""

    def __init__(self, width: int, axes: int, draw: random.Random) -> None:
        super().__init__()
        conv, hidden = CONVOLUTIONS[axes], draw.choice([width, width, 2 * width])
        self.act, self.shortcut = draw.choice(_ACTIVATIONS), draw.choice(["sum", "sum", "sum", "gate", "none"])
        groups = draw.choice([1, 1, 1, 2, 4])
        kernel = draw.choice([1, 3, 3])
        bias = draw.random() < 0.3
        self.first = conv(width, hidden, kernel, padding="same" if draw.random() < 0.3 else kernel // 2, bias=bias)
        self.norm1 = _norm(hidden, axes, draw)
        self.middle = conv(hidden, hidden, 3, padding=1, groups=hidden) if draw.random() < 0.2 else nn.Identity()
        self.second = conv(hidden, width, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm2 = _norm(width, axes, draw)
        self.ends_in_act = draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        """The features, of the same shape."""
        y = self.norm2(self.second(self.middle(self.act(self.norm1(self.first(x))))))
        y = x + y if self.shortcut == "sum" else x * torch.sigmoid(y) if self.shortcut == "gate" else y
        return self.act(y) if self.ends_in_act else y


def _norm(width: int, axes: int, draw: random.Random) -> nn.Module:
    """A norm over channels; batch norms have statistics as if trained."""
    kind = draw.choice(["batch", "batch", "batch", "group", "none"])
    if kind == "group":
        return nn.GroupNorm(draw.choice([1, 2, 4]), width)
    if kind == "none":
        return nn.Identity()
    norm = _NORMS[axes](width)
    for name, low in (("running_mean", -0.5), ("running_var", 0.5)):
        getattr(norm, name).uniform_(low, low + 1)
    return norm


class Mlp(nn.Module):
    """A residual MLP, before or after its norm."""

    def __init__(self, width: int, axes: int, draw: random.Random) -> None:
        super().__init__()
        hidden = draw.choice([2 * width, 4 * width])
        self.norm = draw.choice([nn.LayerNorm(width), nn.Identity()])
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate = nn.Linear(width, hidden) if draw.random() < 0.2 else None
        self.drop, self.act = nn.Dropout(0.1), draw.choice(_ACTIVATIONS)
        self.after = draw.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        """The features, of the same shape."""
        y = x if self.after else self.norm(x)
        hidden = self.act(self.up(y))
        y = self.down(self.drop(hidden if self.gate is None else hidden * self.gate(y)))
        total: Tensor = self.norm(x + y) if self.after else x + y
        return total


class Attention(nn.Module):
    """Residual attention: torch's module, or one written by hand, fused or not."""

    def __init__(self, width: int, axes: int, draw: random.Random) -> None:
        super().__init__()
        self.norm, self.n_heads = nn.LayerNorm(width), draw.choice([2, 4])
        self.form = draw.choice(["module", "fused", "plain"])
        if self.form == "module":
            self.attention = nn.MultiheadAttention(width, self.n_heads, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The features, of the same shape."""
        y = self.norm(x)
        if self.form == "module":
            mixed = self.attention(y, y, y, need_weights=False)[0]
            return torch.add(x, mixed)
        n, length, width = y.shape
        q, k, v = self.qkv(y).view(n, length, 3, self.n_heads, width // self.n_heads).permute(2, 0, 3, 1, 4)
        if self.form == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q @ k.transpose(-1, -2)) * (width // self.n_heads) ** -0.5).softmax(-1) @ v
        return torch.add(x, self.out(mixed.transpose(1, 2).reshape(n, length, width)))


_QUICK: dict[str, Any] = {
    "distill": OneTime(steps=2, views=1, batch_size=8),
    "num_samples": 24,
    "batch_size": 8,
    "device": "cpu",
    "amp": "off",
    "adapt": "none",
}


def check_random_net(seed: int, folder: Path, compress: Callable[..., Any], load: Callable[..., nn.Module]) -> str:
    """A whole run: compress a :class:`RandomNet`, load its artifact into a fresh one, and compare.

    Args:
        seed: of the network; odd ones are asked for a share of the operations, even ones of the latency.
        folder: for the artifact.
        compress: :func:`ttmpd.compress`.
        load: :func:`ttmpd.load`.

    Returns:
        "compressed", or the name of the error of this package with which it was refused.

    Raises:
        AssertionError: the original was changed, the structure of the output is another one, or the artifact answers
            otherwise than the result.
    """
    net = RandomNet(seed)
    samples, batch = net.inputs(24, seed=1), net.inputs(5, seed=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    target: dict[str, Any] = {"macs": 0.7} if seed % 2 else {"speedup": 1.2}
    try:
        result = compress(net, samples, output=folder, **target, **_QUICK)
    except TTMPDError as error:
        return type(error).__name__
    require(
        all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "the original was changed"
    )
    with torch.no_grad():
        original, answer = net(batch), result.model(batch)
        loaded = load(folder, model=RandomNet(seed))(batch)
    require(_form(original) == _form(answer), f"the output must be {_form(original)}, but is {_form(answer)}")
    require(same_outputs(loaded, answer, 1e-6), "the artifact answers otherwise than the result")
    return "compressed"


def _form(output: Any) -> Any:
    names = list(output) if isinstance(output, dict) else None
    return type(output).__name__, names, [tuple(tensor.shape) for tensor in output_tensors(output)]
