"""One class per sample."""

from typing import ClassVar, Literal, Self

from torch import Tensor

from ttmpd.tasks.base import Clues, OneOf, all_rows, as_rows


class Classification(OneOf):
    """One class for each sample; of several heads one class each."""

    class_labels: ClassVar[bool] = True
    source: ClassVar[str] = "soft labels of Hinton et al., 2015 (arXiv 1503.02531)"

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """Any output of two or more class scores per sample."""
        if clues.text in ("token", "next"):
            return None
        if clues.problem_type == "single_label_classification":
            return "config", cls()
        return ("shape", cls()) if all_rows(clues.raw, 2) else None

    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(B, n_classes) as it is."""
        return as_rows(value, self.name)
