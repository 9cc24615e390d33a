"""One class per pixel."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ttmpd.errors import ModelError
from ttmpd.method import check_fields
from ttmpd.tasks._outputs import predicted_tensors
from ttmpd.tasks.base import Clues, OneOf


class Segmentation(OneOf):
    """One class for each pixel: dense scores, (B, n_classes, H, W), read on an even grid of pixels."""

    source: ClassVar[str] = "soft labels of Hinton et al., 2015 (arXiv 1503.02531), for each pixel"
    each: ClassVar[Literal["sample", "token", "pixel"]] = "pixel"
    pixels: int = 256
    """The most pixels of a sample that are read: neighbours say nearly the same, and all of them fill the memory."""
    grid: tuple[int, ...] = ()
    """Rows and columns of pixels that are read of a sample; found from the model."""

    def __post_init__(self) -> None:
        check_fields(self, pixels=1)

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """A model whose library calls it one of segmentation; a picture for a picture must be named."""
        kind, architectures = type(clues.module), getattr(clues.config, "architectures", None)
        names = [kind.__name__, kind.__module__, *(architectures or ())]
        named = any("SemanticSegmentation" in name or ".segmentation." in name for name in names)
        return ("config", cls()) if named else None

    def resolved(self, raw: Any, inputs: Tensor) -> Self:
        """With the grid that is read."""
        task = super().resolved(raw, inputs)
        value = predicted_tensors(raw, task.parts)[0]
        step = self._step(value)
        return task.with_settings(grid=(len(range(0, value.shape[2], step)), len(range(0, value.shape[3], step))))

    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(B * pixels, n_classes): sample by sample, row by row."""
        if value.dim() != 4 or value.shape[1] < 2:
            raise ModelError(
                "a model for segmentation must predict (B, n_classes, H, W) with two classes or more, but its output "
                f"has the shape {tuple(value.shape)}"
            )
        step = self._step(value)
        return value[:, :, ::step, ::step].permute(0, 2, 3, 1).flatten(0, 2)

    def row_counts(self, inputs: Tensor) -> Tensor:
        """(N,) pixels that are read of each sample."""
        if not self.grid:
            raise ModelError("the grid of pixels must be known; see Task.resolved")
        return torch.full((len(inputs),), math.prod(self.grid), dtype=torch.long)

    def records(
        self, raw: Any, inputs: Tensor, *, class_names: Sequence[str] = (), top: int = 5, scores: bool = True
    ) -> list[dict[str, Any]]:
        """The class of every pixel of each sample, in rows of the picture."""
        classes = predicted_tensors(raw, self.parts)[0].argmax(1).cpu()
        return [{"classes": rows.tolist()} for rows in classes]

    def _step(self, value: Tensor) -> int:
        return max(1, math.ceil(math.sqrt(value.shape[2] * value.shape[3] / self.pixels)))
