"""A vector per sample: a backbone without a head."""

from typing import ClassVar, Literal, Self

from torch import Tensor
from torch.nn import functional as F

from ttmpd.errors import ModelError
from ttmpd.method import check_fields
from ttmpd.tasks.base import Clues, Task, named_values

VECTORS = ("pooler_output", "image_embeds", "text_embeds", "sentence_embedding", "last_hidden_state")
"""Names under which backbones give their features."""


class Embedding(Task):
    """A vector for each sample, which others compare or read."""

    source: ClassVar[str] = "mean squared error in units of the teacher's variance, as features are mimicked"
    same: ClassVar[str] = "vectors that point the same way: a cosine of at least the limit, after the mean is taken off"
    reason_not_to_adapt: ClassVar[str] = "a vector does not say how sure it is"
    cosine: float = 0.9
    """Two vectors are the same when the cosine between them, each less the teacher's mean, is at least this."""
    padding: int = -1
    """The token id that the mean over the tokens of a text leaves out; -1 where there is none."""

    def __post_init__(self) -> None:
        check_fields(self, cosine=(-1.0, 1.0))

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """A model whose head was taken off: no classes by its own word, or outputs named as features are."""
        padding = clues.padding if clues.text else -1
        if getattr(clues.module, "num_classes", None) == 0:
            return "config", cls(padding=padding)
        tensors = {name for name, value in named_values(clues.raw).items() if isinstance(value, Tensor)}
        vectors = next((name for name in VECTORS if name in tensors), None)
        if vectors is None or "logits" in tensors:
            return None
        return "config", cls(parts=(vectors,), padding=padding)

    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(B, width); the mean over the tokens of (B, S, width), over the pixels of (B, width, H, W)."""
        if value.dim() == 4:
            return value.mean((2, 3))
        if value.dim() == 3:
            if self.padding < 0 or inputs.shape != value.shape[:2]:
                return value.mean(1)
            there = (inputs != self.padding).to(value)[..., None]
            mean: Tensor = (value * there).sum(1) / there.sum(1).clamp_min(1)
            return mean
        if value.dim() != 2:
            raise ModelError(f"an embedding must be one vector per sample, but has the shape {tuple(value.shape)}")
        return value

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """Mean squared error over the mean variance of the teacher's vectors in these rows."""
        return F.mse_loss(student.float(), teacher.float()) / _variance(teacher)

    def alike(self, student: Tensor, teacher: Tensor) -> Tensor:
        """1 where the cosine reaches the limit."""
        mean = teacher.float().mean(0) if len(teacher) > 1 else 0.0
        return (F.cosine_similarity(student.float() - mean, teacher.float() - mean, -1) >= self.cosine).float()

    def confidence(self, outputs: Tensor) -> Tensor | None:
        """None: a vector does not say how sure it is."""
        return None

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of samples whose nearest other sample has the same class; ``labels`` is (rows,) classes."""
        rows = F.normalize(outputs.float(), dim=-1)
        alike = rows @ rows.T
        alike.fill_diagonal_(-2.0)
        return {"nearest_neighbor_accuracy": float((labels[alike.argmax(-1)] == labels).double().mean())}


def _variance(teacher: Tensor) -> Tensor:
    values = teacher.float()
    return (values.var(0, unbiased=False) if len(values) > 1 else values.square()).mean().clamp_min(1e-12)
