"""One class per token."""

from typing import ClassVar, Literal, Self

from ttmpd.tasks._tokens import OneOfEachToken
from ttmpd.tasks.base import Clues


class TokenClassification(OneOfEachToken):
    """One class for each token of a text, as named entities are told."""

    source: ClassVar[str] = "soft labels of Hinton et al., 2015 (arXiv 1503.02531), for each token"

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """A text model whose class predicts tokens."""
        return ("config", cls(padding=clues.padding)) if clues.text == "token" else None
