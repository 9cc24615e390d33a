"""Unlabelled inputs of a model, stored compactly and prepared batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ttmpd.data.tokenization import token_mask, trim_padding
from ttmpd.errors import InvalidValueError


@dataclass(frozen=True, eq=False)
class Samples:
    """Unlabelled inputs of a model, stored compactly and prepared batch by batch.

    Args:
        inputs: (N, C, H, W) uint8 pixels, or (N, ...) values of any floating type that go to the model as they are, or
            (N, S) int64 token ids.
        ids: one content hash per sample; the same pixels, or the same text, have the same id wherever they lie.
        mean: per-channel mean that is subtracted from pixels scaled to 0..1; empty for floating inputs.
        std: per-channel divisor; empty for floating inputs.
        skipped: (name, reason) of what could not be used.
        names: where each sample came from (file name or row), for reports; empty when unknown.
        padding: token id that fills a text behind its end; None for samples that are no text.
        notes: (note, number of samples) about samples that are used although something was changed.
    """

    inputs: Tensor
    ids: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    padding: int | None = None
    notes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.inputs):
            raise InvalidValueError(f"samples must have one id each, but got {len(self.ids)} for {len(self.inputs)}")
        if self.padding is not None and (self.inputs.dim() != 2 or self.inputs.dtype != torch.int64):
            raise InvalidValueError(
                f"text must be (N, S) int64 token ids, but got {self.inputs.dtype} {tuple(self.inputs.shape)}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        shape, dtype = "x".join(map(str, self.inputs.shape[1:])), str(self.inputs.dtype).removeprefix("torch.")
        return f"<{len(self)} samples of {shape} {dtype}, {len(self.skipped)} skipped>"

    @property
    def is_image(self) -> bool:
        """True where a sample has the shape (C, H, W) with 1, 3 or 4 channels."""
        return self.inputs.dim() == 4 and self.inputs.shape[1] in (1, 3, 4)

    @property
    def is_text(self) -> bool:
        """True where a sample is a row of token ids."""
        return self.padding is not None

    def batch(self, index: slice | Tensor, device: torch.device | str = "cpu") -> Tensor:
        """The chosen samples as inputs of the model, on ``device``: (B, ...) float32, or (B, S) int64 token ids."""
        chosen = self.inputs[index].to(device)
        if chosen.dtype != torch.uint8:
            return chosen.float() if chosen.is_floating_point() else chosen
        shape = (1, -1) + (1,) * (chosen.dim() - 2)
        mean = torch.tensor(self.mean or (0.0,), device=device).view(shape)
        std = torch.tensor(self.std or (1.0,), device=device).view(shape)
        return (chosen.float() / 255 - mean) / std

    def trimmed(self, index: slice | Tensor, device: torch.device | str = "cpu") -> Tensor:
        """The chosen samples for one pass: as :meth:`batch`, but text only as long as the longest of them."""
        return trim_padding(self.batch(index, device), self.padding)

    def token_mask(self, batch: Tensor) -> Tensor | None:
        """(B, S) which tokens of a batch of text are no padding; None for everything that is no text."""
        return token_mask(batch, self.padding)

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """All samples in order, ``batch_size`` at a time; text as long as the longest sample of the batch."""
        for start in range(0, len(self), batch_size):
            yield self.trimmed(slice(start, start + batch_size), device)

    def first(self, n: int) -> "Samples":
        """The first ``n`` samples, or all of them where there are no more; the memory is shared."""
        return replace(self, inputs=self.inputs[:n], ids=self.ids[:n], names=self.names[:n])

    def subset(self, index: Sequence[int]) -> "Samples":
        """The samples at the given positions, in that order."""
        names = tuple(self.names[i] for i in index) if self.names else ()
        ids = tuple(self.ids[i] for i in index)
        return replace(self, inputs=self.inputs[torch.as_tensor(index, dtype=torch.long)], ids=ids, names=names)
