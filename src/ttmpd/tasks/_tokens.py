"""Which tokens' predictions count: what the tasks of tokens share."""

from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from ttmpd.errors import ModelError
from ttmpd.method import check_fields
from ttmpd.tasks.base import OneOf

MAX_OUTPUT_VALUES = 1 << 20
"""Values that the predictions for one sample may have: of models that predict one of a large vocabulary for each token,
only so many tokens count, evenly spread over the sample."""


class OneOfEachToken(OneOf):
    """One of several classes for each token that is no padding."""

    each: ClassVar[Literal["sample", "token", "pixel"]] = "token"
    padding: int = 0
    """The token id that stands behind a text; its predictions do not count."""
    max_tokens: int = 0
    """The most tokens of a sample whose predictions count, evenly spread; 0: by the number of classes."""

    def __post_init__(self) -> None:
        check_fields(self, padding=0, max_tokens=0)

    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(M, n_classes) of (B, S, n_classes): sample by sample the tokens that count."""
        if value.dim() != 3 or value.shape[:2] != inputs.shape:
            raise ModelError(
                f"a model for {self.name} must predict (B, S, n_classes) for (B, S) token ids, but its output has the "
                f"shape {tuple(value.shape)} for {tuple(inputs.shape)}"
            )
        tokens = self.predicted_tokens(inputs)
        return value[tokens]

    def resolved(self, raw: Any, inputs: Tensor) -> Self:
        """With the number of tokens that count, by the number of classes."""
        task = super().resolved(raw, inputs)
        return task.with_settings(max_tokens=task.max_tokens or max(8, MAX_OUTPUT_VALUES // sum(task.widths)))

    def predicted_tokens(self, inputs: Tensor) -> Tensor:
        """(B, S) which tokens count: no padding, and evenly spread where a sample has more than may count."""
        tokens = inputs != self.padding
        if not self.max_tokens:
            return tokens
        n_tokens, rank = tokens.sum(1, keepdim=True), tokens.cumsum(1)
        share = n_tokens.clamp(max=self.max_tokens)
        n_tokens = n_tokens.clamp_min(1)
        return tokens & (rank * share // n_tokens > (rank - 1) * share // n_tokens)
