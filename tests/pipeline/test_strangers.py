"""Transformers that nobody knows by name: units are found by structure, or it is said why there are none."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.distill.one_time import OneTime
from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.models.macs import count_macs
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.inspect import inspect

WIDTH = 32


class Outer(nn.Module):
    """An embedding before what the class is about and a head behind it: (B, 10, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)).mean(1))


class Torchs(Outer):
    """``nn.TransformerEncoder``, which runs fused when nobody looks."""

    def __init__(self, *, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.batch_first = batch_first

    def inner(self, x: Tensor) -> Tensor:
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


class Layer(nn.Module):
    """Pre-norm attention of torch with a scale of its own, and an MLP whose share is passed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, WIDTH))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor, share: float = 1.0) -> Tensor:
        y = self.norm1(x)
        x = x + self.scale * self.attention(y, y, y, need_weights=False)[0]
        return x + share * self.mlp(self.norm2(x))


class Listed(Outer):
    """Layers in a list; or one layer three times, as in ALBERT."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        one = Layer()
        self.layers = nn.ModuleList([one] * 3 if shared else [Layer() for _ in range(3)])

    def inner(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, share=0.7)
        return x


class Reaching(Outer):
    """Later layers read what earlier ones answered, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def inner(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = layer(x)
            kept.append(x)
        for layer, mix in zip(self.up, self.mix, strict=True):
            x = layer(mix(torch.cat([x, kept.pop()], -1)))
        return x


class Crossing(Outer):
    """A few latent tokens ask all others; attention answers with its weights, too."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(0.1 * torch.randn(4, WIDTH))
        self.cross = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(3))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.SiLU(), nn.Linear(64, WIDTH)) for _ in range(3)
        )

    def inner(self, x: Tensor) -> Tensor:
        z = self.latent.expand(len(x), -1, -1)
        for cross, mlp in zip(self.cross, self.mlps, strict=True):
            z = z + cross(z, x, x)[0]
            z = z + mlp(z)
        return z


class Grouped(nn.Module):
    """Grouped queries in one matrix with keys and values, and a gated MLP with gate and values in one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, WIDTH + 2 * 16, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).split([WIDTH, 16, 16], -1)
        heads = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoding(Outer):
    """A row of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*[Grouped() for _ in range(3)])


class Rows(Outer):
    """Layers in dictionaries that are never called themselves: attention by einsum and an MLP, side by side."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"query": WIDTH, "key": WIDTH, "value": WIDTH, "out": WIDTH, "up": 64}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in sizes.items()} | {"down": nn.Linear(64, WIDTH)})
            for _ in range(3)
        )

    def inner(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            parts = [layer[name](x).unflatten(-1, (4, -1)) for name in ("query", "key", "value")]
            weights = torch.einsum("bihd,bjhd->bhij", *parts[:2]).softmax(-1)
            mixed = torch.einsum("bhij,bjhd->bihd", weights, parts[2]).flatten(2)
            x = x + layer["out"](mixed) + layer["down"](layer["up"](x).relu())
        return x


FOUND = {
    "torch's": (Torchs, {"block": 2, "neuron": 3}),
    "torch's, norms first": (lambda: Torchs(norm_first=True), {"block": 2, "neuron": 3}),
    "listed": (Listed, {"block": 3, "neuron": 3}),
    "reaching": (Reaching, {"block": 4, "neuron": 4}),
    "crossing": (Crossing, {"block": 3, "neuron": 3}),
    "decoding": (Decoding, {"block": 3, "neuron": 3}),
    "rows": (Rows, {"neuron": 3}),
}
REFUSED = {
    "tokens first": (lambda: Torchs(batch_first=False), "samples must come first in its output"),
    "one layer again and again": (lambda: Listed(shared=True), "more than once in one pass: 3 times"),
}


def data(n: int) -> Tensor:
    return torch.randn(n, 10, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("quick_timing")
@pytest.mark.parametrize("name", FOUND)
def test_units_are_found_and_go(name: str) -> None:
    make, kinds = FOUND[name]
    torch.manual_seed(0)
    model = make().eval()
    found = inspect(model, data(8), batch_size=4, device="cpu")
    assert {kind: n for kind, n in Counter(unit.kind for unit in found.units).items() if kind in kinds} == kinds
    assert all(timing.ms >= 0 for timing in found.timings)
    quick = OneTime(steps=2, views=1, batch_size=8)
    cut = compress(model, data(40), macs=0.85, batch_size=8, distill=quick, device="cpu")
    left = count_macs(cut.model, data(2))[""] / count_macs(model, data(2))[""]
    assert cut.met and left <= 0.86


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_said_why_there_are_none(name: str) -> None:
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    model = make().eval()
    found = inspect(model, data(8), batch_size=4, device="cpu", timed=False)
    assert not found.units
    assert any(reason in why for _, why in found.refused), found.refused
    with pytest.raises(UnsupportedError, match="must have a block"):
        compress(model, data(40), speedup=1.2, device="cpu")


def test_a_model_that_fails_without_a_word() -> None:
    with pytest.raises(ModelError, match=r"Silent must run on a batch of shape \(2, 10, 8\), but failed: Runtime"):
        inspect(Silent(), data(2), device="cpu")


class Silent(Listed):
    """Raises an error without a text."""

    def inner(self, x: Tensor) -> Tensor:
        raise RuntimeError


def test_operations_of_fused_layers_are_counted() -> None:
    model = Torchs().eval()
    layers = count_macs(model, data(2))[""] - 10 * 8 * WIDTH - 5 * WIDTH
    # A token meets 12 matrices of WIDTH x WIDTH, counting 64 as two, and the others twice in attention.
    assert layers == 3 * (10 * (4 * WIDTH**2 + 2 * 64 * WIDTH) + 2 * 10 * 10 * WIDTH)
    assert torch.backends.mha.get_fastpath_enabled()
