"""The next token of a text."""

from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ttmpd.tasks._tokens import OneOfEachToken
from ttmpd.tasks.base import Clues


class NextToken(OneOfEachToken):
    """What each token of a text is followed by."""

    source: ClassVar[str] = "soft labels of Hinton et al., 2015 (arXiv 1503.02531), for each token"
    same: ClassVar[str] = "the same next token"

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """A decoder of text."""
        return ("config", cls(padding=clues.padding)) if clues.text == "next" else None

    def targets(self, inputs: Tensor) -> Tensor:
        """(M,) the token that follows each one that counts, -1 after the last of a sample.

        Args:
            inputs: (B, S) token ids.
        """
        following = torch.cat([inputs[:, 1:], torch.full_like(inputs[:, :1], self.padding)], 1)
        return torch.where(following == self.padding, -1, following)[self.predicted_tokens(inputs)]
