"""Models of a few thousand weights: every kind of unit is checked on one of them."""

import torch
from torch import Tensor, nn


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
